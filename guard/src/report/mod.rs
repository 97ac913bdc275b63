//! Owns what the guard reports of itself: status, metrics, readiness, tables for people.
//! Called by the daemon, which serves it, and by the command line.
//! Must never be read by what it reports on.

pub mod admin;
pub mod ask;
pub mod assess;
pub mod lines;
pub mod metrics;
mod prometheus_text;
pub mod readiness;
pub mod status;
pub mod status_tables;
pub mod stopped;
pub mod table;
mod upstream_metrics;
pub mod weakness;
