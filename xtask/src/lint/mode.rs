//! Owns what a finding does: it fails the lint, or it is printed while the tree is on its way to being clean.
//! Called by every check that reads the sources.
//! Must never hide a finding.

use anyhow::{Result, bail};

use crate::shell::say;

/// What happens to a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// It is printed.
    Warn,
    /// It fails the lint.
    Refuse,
}

/// Prints the findings that only warn; the others become the error.
pub(super) fn settle(findings: Vec<(Mode, String)>) -> Result<()> {
    let mut refused = Vec::new();
    for (mode, finding) in findings {
        match mode {
            Mode::Refuse => refused.push(finding),
            Mode::Warn => say(format!("warning: {finding}")),
        }
    }
    if refused.is_empty() { Ok(()) } else { bail!("{}", refused.join("\n")) }
}
