//! Owns `nodeguard status`: it asks the daemon, and reads the pins if no daemon answers.
//! Called by `main`.
//! Must never look like a guarded node if it does not know: what a daemon answers badly is an error.

use std::{io::Write, path::Path};

use crate::{
    cli::args::Output,
    report::{
        ask::{AskError, ask},
        lines::{json, line},
        status_tables, stopped,
    },
};

/// Writes the status to `out`. Returns whether a daemon answered; if none does, `err` says so.
pub fn show_status(
    socket: &Path,
    bpffs: &Path,
    output: Output,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, answered) = match runtime.block_on(ask(socket)) {
        Ok(status) => (status, true),
        Err(error @ AskError::Unreachable(..)) => {
            line(err, format_args!("{error}; showing what the pins say"))?;
            (stopped::from_pins(bpffs), false)
        }
        Err(error) => return Err(error.into()),
    };
    match output {
        Output::Table => status_tables::write(&status, out)?,
        Output::Json => json(out, &status)?,
    }
    Ok(answered)
}
