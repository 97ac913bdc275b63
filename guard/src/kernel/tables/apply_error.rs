//! Owns the reasons why a ruleset did not come into force.
//! Called by `apply` and `read_back`.
//! Must never say that a ruleset is not in force after `Activate`: from there on it is.

use aya::maps::MapError;

use crate::kernel::tables::plan::PlanError;

/// Why a ruleset did not come into force. The previous ruleset is still complete.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The change could not be planned.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A map refused a write or a read.
    #[error("cannot read or write the map {0}")]
    Map(&'static str, #[source] MapError),
    /// Waiting for running programs failed.
    #[error("cannot wait until the programs stop using the old ruleset (membarrier)")]
    Grace(#[source] std::io::Error),
}

/// Adds the name of the map to the error of a system call.
pub(crate) fn refused(map: &'static str) -> impl FnOnce(std::io::Error) -> ApplyError {
    move |error| ApplyError::Map(map, MapError::IoError(error))
}
