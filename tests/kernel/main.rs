//! Owns the tests of the kernel half by `BPF_PROG_TEST_RUN`: the programs load, and decide as the host does.
//! Called by `cargo xtask test kernel`, which builds the objects first.
//! Must never attach anything.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::wildcard_enum_match_arm,
    reason = "a test panics and prints figures"
)]

mod agree;
mod bulk;
