//! Owns the life of a pinhole: opened when a known socket connects, closed when the handshake is over or the socket is gone.
//! Called by the kernel's sock_ops hook: `TCP_CONNECT_CB` runs before the SYN leaves, with local address and port chosen.
//! Must never open one for a socket that was neither registered by the daemon nor opened by the node, a caller or the companion.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::sock_ops,
    programs::SockOpsContext,
};
use guard_common::{
    abi::{Address, FlowKey, HealthCounter, Pinhole},
    opened_pinhole,
    packet::mapped,
};

use crate::{
    flows::{close, open},
    maps::{self, CONNECTING, COOKIES, KernelTables, has_netns_helper, node_netns},
    report::lost,
    socket::note_namespace,
};

const AF_INET: u32 = 2;
const TCP_CLOSE: u32 = 7;

/// Opens and closes pinholes. These callbacks ignore the return value.
#[sock_ops]
fn guard_sockops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB if !has_netns_helper() => listening(&ctx),
        // The accepted socket is not a listener: the pinhole is no longer needed.
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => close(&inbound(&ctx)),
        BPF_SOCK_OPS_STATE_CB if new_state(&ctx) == TCP_CLOSE => close(&outbound(&ctx)),
        _ => {}
    }
    1
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let flow = outbound(ctx);
    let registered = registered(ctx);
    let Some(pinhole) = registered.or_else(|| opened_here(ctx, &flow)) else { return };
    if !open(&flow, pinhole, registered.is_some()) {
        return;
    }
    // The end of the socket closes the pinhole even if the daemon is gone.
    if ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32).is_err() {
        close(&flow);
        lost(HealthCounter::PinholesLost);
    }
}

/// Notes the network namespace of a listener.
#[inline(always)]
fn listening(ctx: &SockOpsContext) {
    // SAFETY: `sk` is a socket or null, and the helper takes the program's own context (sock_ops since 5.15).
    let (sk, netns) = unsafe { ((*ctx.ops).__bindgen_anon_2.sk, bpf_get_netns_cookie(ctx.ops.cast())) };
    note_namespace(sk, netns);
}

/// The registration that the daemon made for this very socket. It is used up.
#[inline(always)]
fn registered(ctx: &SockOpsContext) -> Option<Pinhole> {
    // SAFETY: the helper takes the program's own context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.ops.cast()) };
    // SAFETY: the value is copied at once; only the removal below follows.
    let pinhole = unsafe { COOKIES.get(cookie) }.copied()?;
    // A failed removal leaves an entry for a cookie that the kernel never gives out again.
    let _ = COOKIES.remove(cookie);
    Some(pinhole)
}

/// A pinhole for a connection of the node's own network namespace, of a caller or of the companion, to a port whose rule allows it.
#[inline(always)]
fn opened_here(ctx: &SockOpsContext, flow: &FlowKey) -> Option<Pinhole> {
    let is_in_node_namespace = || {
        // SAFETY: the helper takes the program's own context (sock_ops since 5.15).
        let cookie = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
        cookie == node_netns()
    };
    opened_pinhole(flow, || noted(ctx), is_in_node_namespace, &KernelTables)
}

/// What the connect hook noted about this socket. It is used up.
#[inline(always)]
fn noted(ctx: &SockOpsContext) -> Option<Pinhole> {
    // SAFETY: the helper takes the program's own context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.ops.cast()) };
    // SAFETY: the value is copied at once; only the removal below follows.
    let pinhole = unsafe { CONNECTING.get(cookie) }.copied()?;
    let _ = CONNECTING.remove(cookie);
    Some(pinhole)
}

/// The flow that this socket's own packets make at its peer.
#[inline(always)]
fn outbound(ctx: &SockOpsContext) -> FlowKey {
    FlowKey {
        source: local(ctx),
        destination: remote(ctx),
        source_port: (ctx.local_port() as u16).to_be_bytes(),
        destination_port: remote_port(ctx),
    }
}

/// The flow that the peer's packets make at this socket.
#[inline(always)]
fn inbound(ctx: &SockOpsContext) -> FlowKey {
    FlowKey {
        source: remote(ctx),
        destination: local(ctx),
        source_port: remote_port(ctx),
        destination_port: (ctx.local_port() as u16).to_be_bytes(),
    }
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> Address {
    if ctx.family() == AF_INET {
        return mapped(ctx.local_ip4().to_ne_bytes());
    }
    // SAFETY: a pointer into the program's own context.
    maps::words(unsafe { &raw const (*ctx.ops).local_ip6 })
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Address {
    if ctx.family() == AF_INET {
        return mapped(ctx.remote_ip4().to_ne_bytes());
    }
    // SAFETY: a pointer into the program's own context.
    maps::words(unsafe { &raw const (*ctx.ops).remote_ip6 })
}

/// `remote_port` holds the network-order port in the upper half on little-endian machines (`sock_ops_convert_ctx_access`).
#[inline(always)]
fn remote_port(ctx: &SockOpsContext) -> [u8; 2] {
    (u32::from_be(ctx.remote_port()) as u16).to_be_bytes()
}

#[inline(always)]
fn new_state(ctx: &SockOpsContext) -> u32 {
    // SAFETY: `args` is valid for `BPF_SOCK_OPS_STATE_CB`; the second one is the new state.
    unsafe { (&raw const (*ctx.ops).__bindgen_anon_1.args).cast::<u32>().add(1).read_volatile() }
}
