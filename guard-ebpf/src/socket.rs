//! Owns what the programs learn of a socket: its port, protocol, network namespace, the cgroups around it.
//! Called by `ingress`, `egress` and `connect`.
//! Must never judge: these are facts, and one that cannot be had is the one that admits less.

use aya_ebpf::{
    bindings::bpf_sock,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_sk_fullsock, bpf_skb_ancestor_cgroup_id,
    },
    programs::{SkBuffContext, SockAddrContext},
};
use guard_common::{
    Caller, Scope,
    abi::{CGROUP_LEVELS, Generation},
    packet::{TCP, UDP},
};

use crate::maps;

/// States of the kernel's `tcp_states.h`: a listener, a handshake that is not finished, and the state of every unconnected UDP socket.
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;
const TCP_CLOSE: u32 = 7;

/// The port and protocol of a socket that anybody may send to: a TCP listener or an unconnected UDP socket. `None` for every other one.
#[inline(always)]
pub(crate) fn listening(ctx: &SkBuffContext) -> Option<(u16, u8)> {
    // SAFETY: the verifier gives `sk` as a socket or null, and both fields are in the part that every socket has.
    let (sk, state, port) = unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        (sk, (*sk).state, (*sk).src_port as u16)
    };
    match state {
        TCP_LISTEN | TCP_NEW_SYN_RECV => Some((port, TCP)),
        TCP_CLOSE if is_udp(sk) => Some((port, UDP)),
        _ => None,
    }
}

/// Whether a socket is a UDP socket, where a UDP port is guarded at all.
#[inline(always)]
pub(crate) fn is_udp(sk: *mut bpf_sock) -> bool {
    if maps::generation().1.features & Generation::UDP == 0 {
        return false;
    }
    // SAFETY: the argument is a socket that is not null; the result is checked before it is read.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        !full.is_null() && (*full).protocol == UDP as u32
    }
}

/// Whose a packet's socket is, by its network namespace where the kernel tells.
#[inline(always)]
pub(crate) fn scope(ctx: &SkBuffContext) -> Scope {
    if !maps::has_netns_helper() {
        return Scope::Unknown;
    }
    // SAFETY: the helper takes the program's own context (cgroup_skb since 6.15).
    if unsafe { bpf_get_netns_cookie(ctx.skb.skb.cast()) } == maps::node_netns() { Scope::Node } else { Scope::Pod }
}

/// Whether a packet's socket is in the pods' cgroup, where a rule asks for that. Where that cgroup is not there, every listener that is
/// not known for the node's counts as a pod's.
#[inline(always)]
pub(crate) fn in_pods(ctx: &SkBuffContext, scope: Scope) -> bool {
    if matches!(scope, Scope::Node) {
        return false;
    }
    let generation = maps::generation().1;
    if generation.features & Generation::ALL_PODS == 0 {
        return false;
    }
    if generation.pods_cgroup == 0 {
        return true;
    }
    let mut level = 1;
    while level <= CGROUP_LEVELS as i32 {
        // SAFETY: the helper takes the program's own context.
        let cgroup = unsafe { bpf_skb_ancestor_cgroup_id(ctx.skb.skb, level) };
        if cgroup == 0 || cgroup == generation.pods_cgroup {
            return cgroup != 0;
        }
        level += 1;
    }
    false
}

/// The named cgroups around the process that runs now.
#[inline(always)]
pub(crate) fn current_caller(_: &SockAddrContext) -> Caller {
    named(|level| {
        // SAFETY: the helper takes a number.
        unsafe { bpf_get_current_ancestor_cgroup_id(level) }
    })
}

/// The named cgroups around a packet's own socket.
#[inline(always)]
pub(crate) fn socket_caller(ctx: &SkBuffContext) -> Caller {
    named(|level| {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_skb_ancestor_cgroup_id(ctx.skb.skb, level) }
    })
}

#[inline(always)]
fn named(at_level: impl Fn(i32) -> u64) -> Caller {
    let (generation, Generation { features, .. }) = maps::generation();
    let mut caller = Caller { cgroup: 0, roles: 0 };
    if features & Generation::CGROUPS == 0 {
        return caller;
    }
    let mut level = 1;
    while level <= CGROUP_LEVELS as i32 {
        let cgroup = at_level(level);
        if cgroup == 0 {
            break;
        }
        if let Some(roles) = maps::cgroup_roles(cgroup, generation) {
            caller.cgroup = cgroup;
            caller.roles |= roles;
        }
        level += 1;
    }
    caller
}
