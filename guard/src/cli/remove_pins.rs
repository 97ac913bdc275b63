//! Owns `nodeguard unpin`: it removes the guard from the kernel and says which ports are open afterwards.
//! Called by `main`.
//! Must never remove anything while a daemon runs: the daemon would restore it.

use std::{io::Write, os::unix::net::UnixStream, path::Path};

use anyhow::Context;

use crate::{
    cli::args::Output,
    kernel::links::unpin::unpin,
    report::lines::{json, line},
};

/// How many ports of each kind are named.
const NAMED: usize = 32;

/// Removes the pins, and writes what was removed to `out`.
pub fn remove_pins(socket: &Path, bpffs: &Path, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    if UnixStream::connect(socket).is_ok() {
        anyhow::bail!("a daemon answers on {} and would restore everything; stop it first", socket.display());
    }
    let unpinned = unpin(bpffs).with_context(|| bpffs.display().to_string())?;
    if output == Output::Json {
        return Ok(json(out, &unpinned)?);
    }
    let (removed, bpffs) = (unpinned.removed.len(), bpffs.display());
    if removed == 0 {
        return Ok(line(
            out,
            format_args!("Nothing is pinned in {bpffs}, so no guard with this --bpffs was in force."),
        )?);
    }
    line(out, format_args!("Removed {removed} pins from {bpffs}. This node is no longer guarded."))?;
    for (whose, ports) in [("node", &unpinned.node_ports), ("pod", &unpinned.pod_ports)] {
        if !ports.is_empty() {
            let ports = ports.iter().take(NAMED).map(u16::to_string).collect::<Vec<_>>().join(", ");
            line(out, format_args!("Now open to everyone who can reach them: {whose} ports {ports}"))?;
        }
    }
    Ok(())
}
