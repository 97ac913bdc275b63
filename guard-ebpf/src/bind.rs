//! Owns noting the network namespace of a UDP socket when it is bound, where the kernel cannot tell it later (before Linux 6.15).
//! Called by the kernel at the end of bind(2).
//! Must never refuse a bind.

use aya_ebpf::{helpers::generated::bpf_get_netns_cookie, macros::cgroup_sock, programs::SockContext};
use guard_common::packet::UDP;

use crate::{maps::has_netns_helper, socket::note_namespace};

const PROCEED: i32 = 1;

#[cgroup_sock(post_bind4)]
fn guard_bind4(ctx: SockContext) -> i32 {
    bound(&ctx)
}

#[cgroup_sock(post_bind6)]
fn guard_bind6(ctx: SockContext) -> i32 {
    bound(&ctx)
}

#[inline(always)]
fn bound(ctx: &SockContext) -> i32 {
    // SAFETY: a plain field of the program's own context.
    if !has_netns_helper() && unsafe { (*ctx.sock).protocol } == u32::from(UDP) {
        // SAFETY: the helper takes the program's own context (cgroup_sock since 5.7).
        let netns = unsafe { bpf_get_netns_cookie(ctx.sock.cast()) };
        note_namespace(ctx.sock, netns);
    }
    PROCEED
}
