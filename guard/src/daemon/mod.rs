//! Owns the two daemons, `run` and `agent`: their parts, their order, an edit, the end.
//! Called by `main`.
//! Must never detach anything from the kernel: enforcement outlives the daemon.

pub mod agent;
pub mod drain;
pub mod edit;
pub mod hold;
pub mod memory;
pub mod parts;
pub mod policy_watch;
pub mod run;
pub mod state;
