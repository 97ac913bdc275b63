//! Owns why a ruleset did not come into force.
//! Called by `apply` and `read_back`.
//! Must never be returned after `Activate`: from there on the new ruleset is in force.

use aya::maps::MapError;

use crate::kernel::tables::plan::PlanError;

/// Why a ruleset did not come into force. The one before it is still whole.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// No plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A map refused a write or a read.
    #[error("map {0}: {1}")]
    Map(&'static str, #[source] MapError),
    /// The kernel could not be asked to wait.
    #[error("membarrier")]
    Grace(#[source] std::io::Error),
}

pub(crate) fn refused(map: &'static str) -> impl FnOnce(std::io::Error) -> ApplyError {
    move |error| ApplyError::Map(map, MapError::IoError(error))
}
