//! Owns the tests of the kernel half by `BPF_PROG_TEST_RUN`: the programs load, and decide as the host does.
//! Called by `cargo xtask test kernel`, with the objects' directory in `NODEGUARD_BPF_DIR`.
//! Must never attach anything.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "tests panic and print figures")]

mod agree;
mod packets;
