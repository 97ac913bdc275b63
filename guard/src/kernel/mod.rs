//! Owns the kernel half as user space sees it: tables, links, cgroups, the cut of open connections, and what is observed.
//! Called by the daemon, by `dial` for pinholes, and by `report`.
//! Must never know why a ruleset is as it is.

pub mod cgroups;
pub mod cut;
pub mod error;
pub mod links;
pub mod observe;
pub mod pinholes;
pub mod pins;
pub mod syscalls;
pub mod tables;
