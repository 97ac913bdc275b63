//! The agent against the real proxy-server: bytes, certificates, restarts.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "a test fails by panicking")]

mod bytes;
mod certificates;
mod restart;
