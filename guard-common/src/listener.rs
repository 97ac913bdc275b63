//! Owns the listener that a packet is for: its port, and whether it belongs to the node or to a pod.
//! Called by `decide` and by the host for open connections: the same code.
//! Must never tell from the packet what the socket can tell: a packet can be given any shape.

use crate::{
    abi::{CGROUP_LEVELS, Generation},
    in_force::RulesetInForce,
};

/// Whose network namespace a socket is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// The node's own.
    Node,
    /// Another one: a pod's.
    Pod,
    /// The kernel has no helper to tell (before 6.15). The destination address decides; an address of no pod counts as the node's.
    Unknown,
}

/// A TCP listener or an unconnected UDP socket. Its port is the guarded port: no packet shape can hide it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Whose it is.
    pub namespace: Namespace,
    /// The port it listens on, host order.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// Whether it counts as inside the cgroup that pods live in. Determined only if a rule guards ports of every pod.
    pub in_pods: bool,
}

/// Whether a socket counts as inside the pods' cgroup. If a rule guards ports of every pod and that cgroup does not exist, every socket
/// that is not known to be the node's counts. `cgroup_at` gives the id of the socket's cgroup at a level below the root, 0 if there is none.
#[inline(always)]
pub fn in_pods(namespace: Namespace, in_force: &RulesetInForce, cgroup_at: impl Fn(u32) -> u64) -> bool {
    if matches!(namespace, Namespace::Node) || !in_force.has(Generation::ALL_PODS) {
        return false;
    }
    if in_force.pods_cgroup == 0 {
        return true;
    }
    let mut level = 1;
    while level <= CGROUP_LEVELS {
        let cgroup = cgroup_at(level);
        if cgroup == 0 || cgroup == in_force.pods_cgroup {
            return cgroup != 0;
        }
        level = u32::wrapping_add(level, 1);
    }
    false
}
