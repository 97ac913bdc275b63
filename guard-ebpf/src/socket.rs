//! Owns what the programs learn about a socket or a process: port, protocol, network namespace, the cgroups around it.
//! Called by the hooks, and by the judgements of guard-common through `PacketSocket` and `Ancestors`.
//! Must never judge: these are facts, and a fact that the kernel cannot give is replaced by the one that admits less.

use aya_ebpf::{
    bindings::bpf_sock,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_sk_fullsock, bpf_skb_ancestor_cgroup_id,
    },
    programs::SkBuffContext,
};
use guard_common::{
    Ancestors, Namespace, PacketSocket,
    packet::{TCP, UDP},
};

use crate::maps;

/// States of the kernel's `tcp_states.h`: a listener, an unfinished handshake, and the state of every unconnected UDP socket.
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;
const TCP_CLOSE: u32 = 7;

/// The port and protocol of a socket that anybody may send to: a TCP listener or an unconnected UDP socket. `None` for any other socket.
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

#[inline(always)]
fn is_udp(sk: *mut bpf_sock) -> bool {
    // SAFETY: the argument is a socket that is not null; the result is checked before it is read.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        !full.is_null() && (*full).protocol == UDP as u32
    }
}

/// The socket that a packet is for, or that sends it.
pub(crate) struct SkbSocket<'a> {
    pub(crate) ctx: &'a SkBuffContext,
}

impl Ancestors for SkbSocket<'_> {
    #[inline(always)]
    fn cgroup_at(&self, level: u32) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_skb_ancestor_cgroup_id(self.ctx.skb.skb, level as i32) }
    }
}

impl PacketSocket for SkbSocket<'_> {
    #[inline(always)]
    fn namespace(&self) -> Namespace {
        if !maps::has_netns_helper() {
            return Namespace::Unknown;
        }
        // SAFETY: the helper takes the program's own context (cgroup_skb since 6.15).
        let cookie = unsafe { bpf_get_netns_cookie(self.ctx.skb.skb.cast()) };
        if cookie == maps::node_netns() { Namespace::Node } else { Namespace::Pod }
    }

    #[inline(always)]
    fn is_udp(&self) -> bool {
        // SAFETY: the verifier gives `sk` as a socket or null.
        let sk = unsafe { (*self.ctx.skb.skb).__bindgen_anon_2.sk };
        !sk.is_null() && is_udp(sk)
    }
}

/// The process that runs the hook.
pub(crate) struct CurrentProcess;

impl Ancestors for CurrentProcess {
    #[inline(always)]
    fn cgroup_at(&self, level: u32) -> u64 {
        // SAFETY: the helper takes a number.
        unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
    }
}
