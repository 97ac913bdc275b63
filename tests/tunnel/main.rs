//! The agent against the real proxy-server: bytes, certificates, restarts.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::wildcard_enum_match_arm,
    reason = "a test panics and prints figures"
)]

mod audit;
mod bytes;
mod certificates;
mod dropin;
mod hostile;
mod last_hop;
mod load;
mod names;
mod restart;
mod upstream;
