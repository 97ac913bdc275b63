//! Owns the test-run entry points of the development object: the decision about a listener that a map describes.
//! Called by tests through `BPF_PROG_TEST_RUN`, where the kernel passes a dummy socket that `ingress` does not judge.
//! Must never be in the object that the daemon loads.

use aya_ebpf::{
    bindings::{
        tcx_action_base::{TCX_DROP, TCX_PASS},
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    macros::{cgroup_skb, classifier, map, xdp},
    maps::Array,
    programs::{SkBuffContext, TcContext, XdpContext},
};
use guard_common::{
    Decision, Listener, Lookups, PacketBytes, RulesetInForce, Verdict,
    abi::{FlowKey, PeerKey4, PeerKey6, PeerValue, PortKey, PortValue, Probe, list_bytes},
    decide,
    packet::mapped,
};

use crate::{
    bytes::{EthernetFrame, SkbFrame, Window, XdpFrame},
    edge::judge,
    maps::{ACTIVE, KernelTables},
    report::{count, report},
};

#[map]
static PROBE: Array<Probe> = Array::with_max_entries(1, 0);

/// Decides by direct access where the packet allows it.
#[cgroup_skb(ingress)]
fn probe_direct(ctx: SkBuffContext) -> i32 {
    probe(&ctx, false)
}

/// Decides by helper calls alone.
#[cgroup_skb(ingress)]
fn probe_helper(ctx: SkBuffContext) -> i32 {
    probe(&ctx, true)
}

/// What the edge drops if there is a listener, by direct access.
#[xdp(frags)]
fn probe_edge(ctx: XdpContext) -> u32 {
    if probe_frame(&XdpFrame { ctx: &ctx }) { XDP_DROP } else { XDP_PASS }
}

/// The same by helper calls alone.
#[classifier]
fn probe_edge_tc(ctx: TcContext) -> i32 {
    if probe_frame(&SkbFrame { ctx: &ctx, helper_only: true }) { TCX_DROP } else { TCX_PASS }
}

#[inline(always)]
fn probe_frame<F: EthernetFrame>(frame: &F) -> bool {
    judge(frame, |decision| {
        let Some(slot) = PROBE.get_ptr_mut(0) else { return false };
        // SAFETY: an array slot; tests run one packet at a time.
        answer(unsafe { &mut *slot }, decision);
        true
    })
}

/// The cost of an empty test run.
#[cgroup_skb(ingress)]
fn bench_empty(_ctx: SkBuffContext) -> i32 {
    1
}

/// All that `guard_ingress` does for a packet; the listener is taken from the map.
#[cgroup_skb(ingress)]
fn bench_guard(ctx: SkBuffContext) -> i32 {
    let Some((listener, in_pods)) = question() else { return 0 };
    let window = Window { ctx: &ctx, helper_only: false };
    let decision = decide(&window, listener, || in_pods, &RulesetInForce::read(&KernelTables), &KernelTables);
    report(&ctx, listener.port, &decision);
    match decision.verdict {
        Verdict::Allow => 1,
        Verdict::Deny => 0,
    }
}

/// The look-ups that any program needs for a packet that no rule names: which generation, is the port guarded?
#[cgroup_skb(ingress)]
fn bench_floor_port(_ctx: SkBuffContext) -> i32 {
    floor_port().map_or(1, |_| 0)
}

/// The same for a packet that a pinhole admits: also the pinhole and a counter.
#[cgroup_skb(ingress)]
fn bench_floor_pinhole(ctx: SkBuffContext) -> i32 {
    floor(&ctx, false)
}

/// The same for a packet that a prefix of the peer list admits, or that nothing admits: also the peer.
#[cgroup_skb(ingress)]
fn bench_floor_peer(ctx: SkBuffContext) -> i32 {
    floor(&ctx, true)
}

#[inline(always)]
fn floor_port() -> Option<(PortValue, Listener, u8)> {
    let (listener, _) = question()?;
    let generation = ACTIVE.get(0).map_or(0, |active| (active.epoch & 1) as u8);
    let key = PortKey { scope: 0, port: listener.port, protocol: listener.protocol, generation };
    KernelTables.port(&key).map(|port| (port, listener, generation))
}

/// Headers are read at the offsets of a packet without options: nothing is checked.
#[inline(always)]
fn floor(ctx: &SkBuffContext, with_peer: bool) -> i32 {
    let Some((port, listener, generation)) = floor_port() else { return 1 };
    let window = Window { ctx, helper_only: false };
    let list = list_bytes(generation, port.list);
    let destination_port = listener.port.to_be_bytes();
    let Some(head) = window.at::<20>(0) else { return 1 };
    let (has_pinhole, has_peer);
    let allows = |peer: PeerValue| peer.kind == PeerValue::ALLOW;
    if head[0] >> 4 == 4 {
        let Some(source_port) = window.at(20) else { return 1 };
        let address = [head[12], head[13], head[14], head[15]];
        let destination = mapped([head[16], head[17], head[18], head[19]]);
        let flow = FlowKey { source: mapped(address), destination, source_port, destination_port };
        has_pinhole = KernelTables.pinhole(&flow).is_some_and(|pinhole| pinhole.via != 0);
        has_peer = with_peer && KernelTables.peer_v4(&PeerKey4 { list, address }).is_some_and(allows);
    } else {
        let (Some(source), Some(destination), Some(source_port)) = (window.at(8), window.at(24), window.at(40)) else {
            return 1;
        };
        let flow = FlowKey { source, destination, source_port, destination_port };
        has_pinhole = KernelTables.pinhole(&flow).is_some_and(|pinhole| pinhole.via != 0);
        has_peer = with_peer && KernelTables.peer_v6(&PeerKey6 { list, address: source }).is_some_and(allows);
    }
    count(port.rule);
    i32::from(has_pinhole || has_peer)
}

#[inline(always)]
fn question() -> Option<(Listener, bool)> {
    let slot = PROBE.get(0)?;
    Some((Listener::from(slot), slot.in_pods != 0))
}

#[inline(always)]
fn probe(ctx: &SkBuffContext, helper_only: bool) -> i32 {
    let Some(slot) = PROBE.get_ptr_mut(0) else { return 0 };
    // SAFETY: an array slot; tests run one packet at a time.
    let slot = unsafe { &mut *slot };
    let (listener, in_pods) = (Listener::from(&*slot), slot.in_pods != 0);
    let window = Window { ctx, helper_only };
    let decision = decide(&window, listener, || in_pods, &RulesetInForce::read(&KernelTables), &KernelTables);
    answer(slot, &decision);
    match decision.verdict {
        Verdict::Allow => 1,
        Verdict::Deny => 0,
    }
}

#[inline(always)]
fn answer(slot: &mut Probe, decision: &Decision) {
    slot.flow = decision.flow;
    slot.epoch = decision.epoch;
    slot.rule = decision.rule;
    slot.reason = decision.reason as u8;
    slot.audited = u8::from(decision.audited);
}
