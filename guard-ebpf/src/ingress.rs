//! Owns the enforcing hook: cgroup_skb/ingress, every packet that a socket below the cgroup is about to receive.
//! Called by the kernel from `sk_filter_trim_cap`, after DNAT, on loopback too, for every network namespace.
//! Must never touch what is not for a listener: established traffic leaves after one load.

use aya_ebpf::{helpers::generated::bpf_get_netns_cookie, macros::cgroup_skb, programs::SkBuffContext};
use guard_common::{Listener, Scope, Verdict, decide};

use crate::{maps, maps::KernelTables, report::report, window::Window};

/// `TCP_LISTEN` and `TCP_NEW_SYN_RECV` of the kernel's `tcp_states.h`: a listener, or a handshake that is not finished.
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;
const TCP: u8 = 6;

const PASS: i32 = 1;
const DROP: i32 = 0;

/// Judges a packet to a listener: pinhole, then peer, else deny.
#[cgroup_skb(ingress)]
fn guard_ingress(ctx: SkBuffContext) -> i32 {
    let Some(port) = listening_port(&ctx) else { return PASS };
    let listener = Listener { scope: scope(&ctx), port, protocol: TCP };
    let decision = decide(&Window { ctx: &ctx, helper_only: false }, listener, &KernelTables);
    report(&ctx, listener, &decision);
    match decision.verdict {
        Verdict::Allow => PASS,
        Verdict::Deny => DROP,
    }
}

/// The port of the listening socket that the packet is for; `None` for every other socket.
#[inline(always)]
fn listening_port(ctx: &SkBuffContext) -> Option<u16> {
    // SAFETY: the verifier gives `sk` as a socket or null, and both fields are in the part that every socket has.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        let state = (*sk).state;
        if state != TCP_LISTEN && state != TCP_NEW_SYN_RECV {
            return None;
        }
        Some((*sk).src_port as u16)
    }
}

/// Whose the listener is, by its network namespace where the kernel tells.
#[inline(always)]
fn scope(ctx: &SkBuffContext) -> Scope {
    if !maps::has_netns_helper() {
        return Scope::Unknown;
    }
    // SAFETY: the helper takes the program's own context (cgroup_skb since 6.15).
    if unsafe { bpf_get_netns_cookie(ctx.skb.skb.cast()) } == maps::node_netns() { Scope::Node } else { Scope::Pod }
}
