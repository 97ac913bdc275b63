//! Owns the programs and their links: loading, attaching, pinning, mending, handing over, removing.
//! Called by `daemon/run` at start, by `daemon/hold` every few seconds, by `report`, and by `main` for `unpin`.
//! Must never attach before a ruleset is in force.

pub(crate) mod earlier_sockets;
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
