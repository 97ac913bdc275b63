//! Owns what the guard says of itself: status, metrics, health, tables for people.
//! Called by the daemon, which serves it, and by the command line.
//! Must never be read by what it reports on.

pub mod admin;
pub mod dialling;
pub mod edge;
pub mod metrics;
pub mod snapshot;
pub mod status;
pub mod table;
pub mod upstream_metrics;
pub mod usage;
