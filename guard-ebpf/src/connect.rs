//! Owns the hooks before a socket connects or sends to a new destination: who is it, and may it go there?
//! Called by the kernel in the process's own context, before any address translation.
//! Must never cost anything if the policy names neither a cgroup nor the control plane.

use aya_ebpf::{
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use guard_common::{
    Destination, Reached, Verdict,
    abi::{Address, CgroupValue, Pinhole},
    judge_connection,
    packet::{TCP, UDP, mapped},
};

use crate::{
    maps::{self, CONNECTING, KernelTables},
    report::report_reach,
    socket::{CurrentProcess, note_namespace},
};

const PROCEED: i32 = 1;
/// The system call fails with EPERM.
const REFUSE: i32 = 0;

#[cgroup_sock_addr(connect4)]
fn guard_connect4(ctx: SockAddrContext) -> i32 {
    judge(&ctx, v4(&ctx))
}

#[cgroup_sock_addr(connect6)]
fn guard_connect6(ctx: SockAddrContext) -> i32 {
    judge(&ctx, v6(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
fn guard_sendmsg4(ctx: SockAddrContext) -> i32 {
    judge(&ctx, v4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn guard_sendmsg6(ctx: SockAddrContext) -> i32 {
    judge(&ctx, v6(&ctx))
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, address: Address) -> i32 {
    // SAFETY: plain fields of the program's own context.
    let (protocol, port) = unsafe { ((*ctx.sock_addr).protocol as u8, (*ctx.sock_addr).user_port as u16) };
    let destination = Destination { address, port: u16::from_be(port), protocol };
    let reached = judge_connection(&CurrentProcess, destination, &KernelTables);
    report_reach(ctx, destination, &reached);
    match reached.verdict {
        Verdict::Allow => {}
        Verdict::Deny => return REFUSE,
    }
    match protocol {
        TCP => note_caller(ctx, &reached),
        UDP if !maps::has_netns_helper() => note_sender(ctx),
        _ => {}
    }
    PROCEED
}

/// Notes who connects. Whoever has no role takes back the note of an earlier owner of the socket.
#[inline(always)]
fn note_caller(ctx: &SockAddrContext, reached: &Reached) {
    if !reached.has_callers {
        return;
    }
    let caller = reached.caller;
    // SAFETY: the helper takes the program's own context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    if caller.roles == 0 {
        let _ = CONNECTING.remove(cookie);
        return;
    }
    let via = if caller.roles & CgroupValue::COMPANION != 0 { Pinhole::TUNNEL } else { Pinhole::CALLER };
    // A note that does not fit opens no pinhole: the connection is denied at the port.
    let _ = CONNECTING.insert(cookie, Pinhole { via, reserved: 0, cgroup: caller.cgroup }, 0);
}

/// Notes the network namespace of a socket that sends datagrams.
#[inline(always)]
fn note_sender(ctx: &SockAddrContext) {
    // SAFETY: the helper takes the program's own context, and `sk` is a socket or null.
    let (sk, netns) = unsafe { ((*ctx.sock_addr).__bindgen_anon_1.sk, bpf_get_netns_cookie(ctx.sock_addr.cast())) };
    note_namespace(sk, netns);
}

#[inline(always)]
fn v4(ctx: &SockAddrContext) -> Address {
    // SAFETY: a plain field of the program's own context.
    mapped(unsafe { (*ctx.sock_addr).user_ip4 }.to_ne_bytes())
}

#[inline(always)]
fn v6(ctx: &SockAddrContext) -> Address {
    // SAFETY: a pointer into the program's own context.
    maps::words(unsafe { &raw const (*ctx.sock_addr).user_ip6 })
}
