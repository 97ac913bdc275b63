//! Owns finding cgroups: the root that the programs attach to, and the cgroups that a policy names.
//! Called by `cli/config`, `daemon`, `kernel/tables` and `kernel/cut`.
//! Must never keep the id of a removed cgroup.

pub mod follow;
pub mod root;
