//! Owns the kernel half as user space sees it: tables, links, cgroups, cutting open connections, and observations.
//! Called by `daemon`, by `dial` for pinholes and listeners, by `report`, and by `main` for `unpin`.
//! Must never know why a ruleset is as it is.

pub mod cgroups;
pub(crate) mod conntrack;
pub mod cut;
pub mod error;
pub mod links;
pub mod namespaces;
pub mod observe;
pub mod pinholes;
pub mod pins;
pub mod syscalls;
pub mod tables;
