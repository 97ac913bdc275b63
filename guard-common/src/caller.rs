//! Owns who a local process is by the policy: the named cgroups around it.
//! Called by `reach` for a process that connects or sends, and by `openings` for a socket that sends.
//! Must never name a process by anything that the process itself can choose.

use crate::{
    abi::{CGROUP_LEVELS, CgroupKey, Generation},
    in_force::RulesetInForce,
    lookups::{Ancestors, CgroupLookups},
};

/// A local process or socket, identified by the deepest cgroup around it that the policy names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalCaller {
    /// The id of that cgroup; 0 if the policy names none of them.
    pub cgroup: u64,
    /// The roles of every named cgroup around it: `CgroupValue::*`.
    pub roles: u32,
}

/// Looks up the named cgroups around a process or socket.
#[inline(always)]
pub fn local_caller<A: Ancestors, L: CgroupLookups>(around: &A, in_force: &RulesetInForce, lookups: &L) -> LocalCaller {
    let mut caller = LocalCaller { cgroup: 0, roles: 0 };
    if !in_force.has(Generation::CGROUPS) {
        return caller;
    }
    let generation = u64::from(in_force.key_generation());
    let mut level = 1;
    while level <= CGROUP_LEVELS {
        let cgroup = around.cgroup_at(level);
        if cgroup == 0 {
            break;
        }
        if let Some(value) = lookups.cgroup(&CgroupKey { cgroup, generation }) {
            caller.cgroup = cgroup;
            caller.roles |= value.roles;
        }
        level = u32::wrapping_add(level, 1);
    }
    caller
}
