//! Owns turning findings into the outcome of a check.
//! Called by every check that reads the sources.
//! Must never hide a finding.

use anyhow::{Result, bail};

/// An error with every finding, if there is one.
pub(super) fn settle(findings: &[String]) -> Result<()> {
    if findings.is_empty() { Ok(()) } else { bail!("{}", findings.join("\n")) }
}
