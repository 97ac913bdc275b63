//! Owns the kernel's part of the bench: starts the measuring program, which keeps everything inside a lab of its own.
//! Called by `bench`.
//! Must never measure a debug build.

use anyhow::Result;

use super::rows::{Row, rows_of};

/// Runs it; its progress is shown, its output are the rows.
pub(super) fn measure(quick: bool) -> Result<Vec<Row>> {
    rows_of("nodeguard-kernel-bench", &[], quick)
}
