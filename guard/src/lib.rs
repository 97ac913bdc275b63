//! Owns the daemon and the command line of Nodeguard, as a library under a thin `main`.
//! Called by `main.rs` and by the integration tests.
//! Must never be published: its only interface is the `nodeguard` command.
//!
//! Each room imports only what stands to its right, and `cargo xtask test lint` keeps it so:
//! `daemon -> cli -> report -> tunnel -> dial -> cluster -> kernel -> net -> wire -> sys`. All of them may use `guard-policy` (what a policy says)
//! and `guard-common` (what the kernel decides).

pub mod cli;
pub mod cluster;
pub mod daemon;
pub mod dial;
pub mod kernel;
pub mod net;
pub mod report;
pub mod sys;
pub mod tunnel;
pub mod wire;
