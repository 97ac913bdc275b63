//! Owns the tunnel's part of the bench: starts the measuring program, which keeps everything on a loopback of its own.
//! Called by `bench`.
//! Must never measure a debug build.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::Row;
use crate::shell::{command, root};

/// Runs it; its progress is shown, its output are the rows.
pub(super) fn measure(quick: bool) -> Result<Vec<Row>> {
    let mut program = command(root().join("target/release/nodeguard-tunnel-bench"));
    let output =
        program.args(quick.then_some("--quick")).stderr(Stdio::inherit()).output().context("nodeguard-tunnel-bench")?;
    ensure!(output.status.success(), "nodeguard-tunnel-bench failed ({})", output.status);
    serde_json::from_slice(&output.stdout).context("what nodeguard-tunnel-bench printed")
}
