//! Owns who opened a UDP conversation: cgroup_skb/egress, every packet that a socket below the cgroup is about to send.
//! Called by the kernel in `ip_finish_output`, before fragmentation.
//! Must never drop a packet: it only remembers what the ingress program will ask.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, macros::cgroup_skb, programs::SkBuffContext};
use guard_common::{
    Packet, Ports, Scope, Tables,
    abi::{FlowKey, Health, Pinhole, PortKey, PortValue, ScopeKey, ScopeValue, UDP_FLOW_SECONDS},
    packet::UDP,
    parse,
};

use crate::{
    maps::{self, KernelTables, UDP_FLOWS},
    report::lost,
    socket::{in_pods, is_udp, scope, socket_caller},
    window::Window,
};

const PASS: i32 = 1;

/// Remembers the UDP conversations that a guarded socket opens, and those that the node or a caller opens with a guarded port.
#[cgroup_skb(egress)]
fn guard_egress(ctx: SkBuffContext) -> i32 {
    // SAFETY: the verifier gives `sk` as a socket or null.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if sk.is_null() || !is_udp(sk) {
        return PASS;
    }
    let window = Window { ctx: &ctx, helper_only: false };
    if let Some(packet @ Packet { ports: Some(ports), .. }) = parse(&window, UDP) {
        remember(&ctx, &packet, ports);
    }
    PASS
}

#[inline(always)]
fn remember(ctx: &SkBuffContext, packet: &Packet, ports: Ports) {
    let generation = maps::generation().0;
    let port_of = |scope, port: [u8; 2]| {
        KernelTables.port(&PortKey { scope, port: u16::from_be_bytes(port), protocol: UDP, generation })
    };
    let set_of =
        |address| KernelTables.scope(&ScopeKey { generation: [generation, 0, 0, 0], address }).map(|value| value.scope);
    let own = scope(ctx);
    // What comes back to a guarded port that sent first is a reply.
    let local = match own {
        Scope::Node => port_of(ScopeValue::NODE, ports.source),
        Scope::Pod | Scope::Unknown => match set_of(packet.source) {
            Some(set) => port_of(set, ports.source),
            None if in_pods(ctx, own) => port_of(ScopeValue::ALL_PODS, ports.source),
            None => port_of(ScopeValue::NODE, ports.source),
        },
    };
    if local.is_some() {
        let reply = FlowKey {
            source: packet.destination,
            destination: packet.source,
            source_port: ports.destination,
            destination_port: ports.source,
        };
        touch(&reply, Pinhole::REPLY, 0);
    }
    // What goes to a guarded port of this node may be the node's own doing, or a caller's.
    let flags = [Some(ScopeValue::NODE), set_of(packet.destination), Some(ScopeValue::ALL_PODS)]
        .into_iter()
        .flatten()
        .filter_map(|scope| port_of(scope, ports.destination))
        .fold(0, |flags, port| flags | port.flags);
    let (mut via, mut cgroup) = (0, 0);
    if flags & PortValue::ALLOW_NODE != 0 && matches!(own, Scope::Node) {
        via |= Pinhole::NODE;
    }
    if flags & PortValue::ALLOW_CALLER != 0 {
        let caller = socket_caller(ctx);
        if caller.roles != 0 {
            (via, cgroup) = (via | Pinhole::CALLER, caller.cgroup);
        }
    }
    if via != 0 {
        let flow = FlowKey {
            source: packet.source,
            destination: packet.destination,
            source_port: ports.source,
            destination_port: ports.destination,
        };
        touch(&flow, via, cgroup);
    }
}

/// Enters a conversation, or notes that it goes on. Who opened one that has not run out stays who opened it.
#[inline(always)]
pub(crate) fn touch(flow: &FlowKey, via: u32, cgroup: u64) {
    let now = seconds();
    if let Some(known) = UDP_FLOWS.get_ptr_mut(flow) {
        // SAFETY: an element of the table; a lost race loses a second's precision of `at`.
        let known = unsafe { &mut *known };
        if now.wrapping_sub(known.at) <= UDP_FLOW_SECONDS {
            if known.via == via {
                known.at = now;
            }
            return;
        }
    }
    if UDP_FLOWS.insert(flow, Pinhole { via, at: now, cgroup }, 0).is_err() {
        lost(Health::PinholesLost);
    }
}

/// Seconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn seconds() -> u32 {
    // SAFETY: the helper takes nothing.
    (unsafe { bpf_ktime_get_ns() } / 1_000_000_000) as u32
}
