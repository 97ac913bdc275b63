//! Owns the hooks before a socket connects or sends to a new destination: who is it, and may it go there?
//! Called by the kernel in the process's own context, before any address translation.
//! Must never cost anything if the policy names neither a cgroup nor the control plane.

use aya_ebpf::{helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr, programs::SockAddrContext};
use guard_common::{
    Destination, Verdict,
    abi::{Address, CgroupValue, Pinhole},
    judge_connection,
    packet::{TCP, mapped},
};

use crate::{
    maps::{self, CONNECTING, KernelTables},
    report::report_reach,
    socket::CurrentProcess,
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
    let caller = reached.caller;
    if caller.roles != 0 && protocol == TCP {
        let via = if caller.roles & CgroupValue::COMPANION != 0 { Pinhole::TUNNEL } else { Pinhole::CALLER };
        // SAFETY: the helper takes the program's own context.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
        // A note that does not fit opens no pinhole: the connection is denied at the port.
        let _ = CONNECTING.insert(cookie, Pinhole { via, at: 0, cgroup: caller.cgroup }, 0);
    }
    PROCEED
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
