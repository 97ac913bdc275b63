//! Owns what a socket of this node opens: the pinhole of a TCP connection, the answer to a UDP socket, the way of a UDP datagram.
//! Called by guard-ebpf's `sockops` and `egress`, and by the tests.
//! Must never admit anything: `decide` asks for what was opened and judges it by the rule.

use crate::{
    abi::{AskedKey, FlowKey, Generation, Pinhole, PortKey, PortValue, ScopeValue, SentDatagram},
    caller::local_caller,
    in_force::RulesetInForce,
    listener::Namespace,
    lookups::{CgroupLookups, Conversations, Lookups, PacketSocket},
    packet::{Headers, PacketBytes, TCP, UDP, parse},
};

/// The pinhole of a connection that starts on this node, if a rule that may guard its destination admits whoever opened it: the node's
/// own network namespace, a caller or the companion. `noted` takes what the connect hook noted about the socket.
#[inline(always)]
pub fn opened_pinhole<L: Lookups>(
    flow: &FlowKey,
    noted: impl FnOnce() -> Option<Pinhole>,
    is_in_node_namespace: impl FnOnce() -> bool,
    lookups: &L,
) -> Option<Pinhole> {
    let in_force = RulesetInForce::read(lookups);
    let mut pinhole = Pinhole::default();
    if in_force.has(Generation::CGROUPS) {
        pinhole = noted().unwrap_or_default();
    }
    if pinhole.via != Pinhole::TUNNEL && is_in_node_namespace() {
        pinhole.via |= Pinhole::NODE;
    }
    let allows = allowed_selectors(flow, &in_force, lookups);
    let serves = |via, flag| pinhole.via & via != 0 && allows & flag != 0;
    let admits = serves(Pinhole::TUNNEL, PortValue::ALLOW_TUNNEL)
        || serves(Pinhole::NODE, PortValue::ALLOW_NODE)
        || serves(Pinhole::CALLER, PortValue::ALLOW_CALLER);
    if admits { Some(pinhole) } else { None }
}

/// The selectors of every rule that may guard the destination: only the listener tells whose it is.
#[inline(always)]
fn allowed_selectors<L: Lookups>(flow: &FlowKey, in_force: &RulesetInForce, lookups: &L) -> u16 {
    selectors(TCP, flow.destination_port, in_force, lookups).unwrap_or(0)
}

/// What a packet that is about to be sent means for guarded UDP ports: a guarded socket asks, or the node or a caller sends to a guarded
/// port of this node. Nothing if no UDP port is guarded or if the packet is not a readable UDP datagram of a UDP socket.
#[inline(always)]
pub fn sent_datagram<S: PacketSocket, B: PacketBytes + ?Sized, L: Lookups + CgroupLookups, C: Conversations>(
    socket: &S,
    bytes: &B,
    lookups: &L,
    conversations: &C,
) {
    let in_force = RulesetInForce::read(lookups);
    if !in_force.has(Generation::UDP) || !socket.is_udp() {
        return;
    }
    let Some(headers @ Headers { ports: Some(ports), .. }) = parse(bytes, UDP) else { return };
    let (namespace, netns) = socket.namespace();
    // An entry concerns this socket alone, so it does not matter which of the rules for this port number is the socket's.
    if selectors(UDP, ports.source, &in_force, lookups).is_some() {
        let key = AskedKey {
            socket: socket.cookie(),
            address: headers.destination,
            port: ports.destination,
            reserved: [0; 6],
        };
        conversations.asks(namespace, &key);
    }
    let Some(allows) = selectors(UDP, ports.destination, &in_force, lookups) else { return };
    let flow = FlowKey {
        source: headers.source,
        destination: headers.destination,
        source_port: ports.source,
        destination_port: ports.destination,
    };
    let (mut via, mut cgroup) = (0, 0);
    if allows & PortValue::ALLOW_NODE != 0 && matches!(namespace, Namespace::Node) {
        via = Pinhole::NODE;
    }
    if allows & PortValue::ALLOW_CALLER != 0 {
        let caller = local_caller(socket, &in_force, lookups);
        if caller.roles != 0 {
            (via, cgroup) = (via | Pinhole::CALLER, caller.cgroup);
        }
    }
    if via == 0 {
        conversations.takes_over(&flow, netns);
    } else {
        conversations.sends(&flow, SentDatagram { cgroup, netns, at_ns: 0, via, reserved: 0 });
    }
}

/// The selectors (`PortValue::ALLOW_*`) of every rule that guards this port number, of the node or of pods; `None` if no rule does.
#[inline(always)]
fn selectors<L: Lookups>(protocol: u8, port: [u8; 2], in_force: &RulesetInForce, lookups: &L) -> Option<u16> {
    let (generation, port) = (in_force.key_generation(), u16::from_be_bytes(port));
    // A number and not an `Option` of each: the verifier rejects what the compiler makes of two pointers that may be null.
    const GUARDED: u32 = 1 << 31;
    let flags = |scope| {
        let port = lookups.port(&PortKey { scope, port, protocol, generation });
        port.map_or(0, |port| u32::from(port.flags) | GUARDED)
    };
    let node = flags(ScopeValue::NODE);
    let pods = if in_force.has(Generation::PODS) { flags(ScopeValue::OTHER_PODS) } else { 0 };
    if (node | pods) & GUARDED == 0 {
        return None;
    }
    Some(node as u16 | (pods as u16 >> PortValue::OPENS_SHIFT))
}
