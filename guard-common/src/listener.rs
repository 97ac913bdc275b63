//! Owns the listener that a packet is for: its port, whose network namespace it is in, and whether it belongs to a pod.
//! Called by `decide` and by the host for open connections: the same code.
//! Must never tell from the packet what the socket can tell: a packet can be given any shape and any address.

use crate::{
    abi::{CGROUP_LEVELS, Generation, Probe},
    in_force::RulesetInForce,
};

/// Whose network namespace a socket is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// The node's own.
    Node,
    /// Another one: a pod's.
    Pod,
    /// It cannot be told: the kernel has no helper (before 6.15), and the socket was there before the guard or was never bound. Such a
    /// listener is judged as the node's and as a pod's, and denied by either.
    Unknown,
}

/// A TCP listener or an unconnected UDP socket. Its port is the guarded port: no packet shape can hide it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Whose it is.
    pub namespace: Namespace,
    /// The cookie of its network namespace; 0 if it cannot be told.
    pub netns: u64,
    /// The cookie of a UDP socket. Of a TCP listener it is not asked.
    pub socket: u64,
    /// The port it listens on, host order.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// Whether the packet came in over the loopback interface of the listener's network namespace: it was sent in that namespace.
    pub over_loopback: bool,
}

impl Listener {
    /// The index of the loopback interface: the first of each network namespace (Linux, `LOOPBACK_IFINDEX`).
    pub const LOOPBACK_INTERFACE: u32 = 1;

    /// A listener in the node's own network namespace, for a packet from another machine or namespace.
    pub const fn of_node(port: u16, protocol: u8) -> Listener {
        Listener { namespace: Namespace::Node, netns: 0, socket: 0, port, protocol, over_loopback: false }
    }
}

/// The listener that a test run describes.
impl From<&Probe> for Listener {
    fn from(question: &Probe) -> Listener {
        Listener {
            namespace: match question.scope {
                0 => Namespace::Node,
                1 => Namespace::Pod,
                _ => Namespace::Unknown,
            },
            netns: u64::from(question.netns),
            socket: u64::from(question.socket),
            port: question.port,
            protocol: question.protocol,
            over_loopback: question.over_loopback != 0,
        }
    }
}

/// Whether a socket counts as inside the pods' cgroup. If a rule guards ports of pods and that cgroup does not exist, every socket counts.
/// `cgroup_at` gives the id of the socket's cgroup at a level below the root, 0 if there is none.
#[inline(always)]
pub fn in_pods(in_force: &RulesetInForce, cgroup_at: impl Fn(u32) -> u64) -> bool {
    if !in_force.has(Generation::PODS) {
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
