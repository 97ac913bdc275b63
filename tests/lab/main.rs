//! The whole guard in network namespaces: the main job, a killed daemon, edits, removal.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::wildcard_enum_match_arm,
    reason = "a test panics and prints figures"
)]

mod all_pods;
mod callers;
mod capabilities;
mod closed;
mod companion;
mod drift;
mod edge;
mod edits;
mod established;
mod flips;
mod flood;
mod http_proxy;
mod hub;
mod kill;
mod main_job;
mod paths;
mod place;
mod shapes;
mod sweep;
mod translated;
mod udp;
mod unpin;
mod upgrade;
mod usage;
