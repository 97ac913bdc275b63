//! Owns the programs and their links: loaded, attached, pinned, mended, handed over, removed.
//! Called by the daemon at its start, and every few moments.
//! Must never attach before a ruleset is in force.

pub mod edge_hooks;
pub mod edge_tier;
pub mod map_definition;
pub mod mend;
pub mod object;
#[cfg(feature = "ebpf-log")]
mod program_log;
pub mod programs;
pub mod unpin;
pub mod upgrade;
