//! The whole guard in network namespaces: the main job, a killed daemon, edits, removal.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "a test fails by panicking")]

mod edits;
mod kill;
mod main_job;
mod unpin;
