//! Owns the life of a pinhole: opened when a known socket connects, closed when the handshake is over or the socket is gone.
//! Called by the kernel's sock_ops hook: `TCP_CONNECT_CB` runs before the SYN leaves, with local address and port chosen.
//! Must never open one for a socket that was neither registered by the daemon nor opened in the node's own network namespace.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::sock_ops,
    programs::SockOpsContext,
};
use guard_common::{
    Tables,
    abi::{Address, FlowKey, Health, Pinhole, PortKey, PortValue, ScopeKey, ScopeValue},
    packet::mapped,
};

use crate::{
    maps::{COOKIES, KernelTables, PINHOLES, node_netns},
    report::lost,
};

const AF_INET: u32 = 2;
const TCP: u8 = 6;
const TCP_CLOSE: u32 = 7;

/// Opens and closes pinholes. The return value is not used by these callbacks.
#[sock_ops]
fn guard_sockops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        // The accepted socket is no listener: the pinhole has done its work.
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => close(&inbound(&ctx)),
        BPF_SOCK_OPS_STATE_CB if new_state(&ctx) == TCP_CLOSE => close(&outbound(&ctx)),
        _ => {}
    }
    1
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let flow = outbound(ctx);
    let Some(pinhole) = registered(ctx).or_else(|| opened_by_node(ctx, &flow)) else { return };
    if PINHOLES.insert(flow, pinhole, 0).is_err() {
        lost(Health::PinholesLost);
        return;
    }
    // The socket's end closes the pinhole even where the daemon is gone.
    if ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32).is_err() {
        close(&flow);
        lost(Health::PinholesLost);
    }
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

/// A pinhole for a connection from the node's own network namespace to a port whose rule allows `node`.
#[inline(always)]
fn opened_by_node(ctx: &SockOpsContext, flow: &FlowKey) -> Option<Pinhole> {
    // SAFETY: the helper takes the program's own context (sock_ops since 5.15).
    if unsafe { bpf_get_netns_cookie(ctx.ops.cast()) } != node_netns() {
        return None;
    }
    let generation = (KernelTables.epoch() & 1) as u8;
    let allows = |scope| {
        let key = PortKey { scope, port: u16::from_be_bytes(flow.destination_port), protocol: TCP, generation };
        KernelTables.port(&key).is_some_and(|port| port.flags & PortValue::ALLOW_NODE != 0)
    };
    let pods = || {
        let key = ScopeKey { generation: [generation, 0, 0, 0], address: flow.destination };
        KernelTables.scope(&key).is_some_and(|value| value.scope != ScopeValue::NODE && allows(value.scope))
    };
    if allows(ScopeValue::NODE) || pods() { Some(Pinhole { via: Pinhole::NODE }) } else { None }
}

#[inline(always)]
fn close(flow: &FlowKey) {
    // Absent is the usual case: most sockets never had a pinhole.
    let _ = PINHOLES.remove(flow);
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
    words(unsafe { &raw const (*ctx.ops).local_ip6 })
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Address {
    if ctx.family() == AF_INET {
        return mapped(ctx.remote_ip4().to_ne_bytes());
    }
    // SAFETY: a pointer into the program's own context.
    words(unsafe { &raw const (*ctx.ops).remote_ip6 })
}

/// Four context words as an address. Volatile, because the verifier refuses two words read as one.
#[inline(always)]
fn words(from: *const [u32; 4]) -> Address {
    let from: *const u32 = from.cast();
    // SAFETY: the four words of one context field.
    let word = |index: usize| unsafe { from.add(index).read_volatile() }.to_ne_bytes();
    let (a, b, c, d) = (word(0), word(1), word(2), word(3));
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
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
