//! Owns finding cgroups: the root that the programs attach to, and those that a policy names.
//! Called by `tables` and the daemon.
//! Must never keep the id of a cgroup that is gone.

pub mod follow;
pub mod root;
