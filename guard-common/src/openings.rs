//! Owns which flows a socket of this node opens: the pinhole of a TCP connection, the conversation of a UDP datagram.
//! Called by guard-ebpf's `sockops` and `egress`, and by the tests.
//! Must never admit anything: `decide` asks for a pinhole or a conversation and judges it by the rule.

use crate::{
    abi::{FlowKey, Generation, Pinhole, PortKey, PortValue, ScopeKey, ScopeValue},
    caller::local_caller,
    in_force::RulesetInForce,
    listener::{Namespace, in_pods},
    lookups::{CgroupLookups, Lookups, PacketSocket},
    packet::{Headers, PacketBytes, Ports, TCP, UDP, parse},
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
    let generation = in_force.key_generation();
    let flags = |scope| {
        let key = PortKey { scope, port: u16::from_be_bytes(flow.destination_port), protocol: TCP, generation };
        lookups.port(&key).map_or(0, |port| port.flags)
    };
    let key = ScopeKey { generation: [generation, 0, 0, 0], address: flow.destination };
    let set = match lookups.scope(&key) {
        Some(value) if value.scope != ScopeValue::NODE => flags(value.scope),
        Some(_) | None => 0,
    };
    let all_pods = if in_force.has(Generation::ALL_PODS) { flags(ScopeValue::ALL_PODS) } else { 0 };
    flags(ScopeValue::NODE) | set | all_pods
}

/// The conversations that a packet about to be sent opens or continues; `enter` is called with each. None if no UDP port is guarded or if
/// the packet is not a readable UDP datagram.
#[inline(always)]
pub fn sent_datagram<S: PacketSocket, B: PacketBytes + ?Sized, L: Lookups + CgroupLookups>(
    socket: &S,
    bytes: &B,
    lookups: &L,
    mut enter: impl FnMut(&FlowKey, Pinhole),
) {
    let in_force = RulesetInForce::read(lookups);
    if !in_force.has(Generation::UDP) || !socket.is_udp() {
        return;
    }
    let Some(headers @ Headers { ports: Some(ports), .. }) = parse(bytes, UDP) else { return };
    let namespace = socket.namespace();
    if is_guarded_sender(socket, namespace, &headers, ports, &in_force, lookups) {
        let reply = FlowKey {
            source: headers.destination,
            destination: headers.source,
            source_port: ports.destination,
            destination_port: ports.source,
        };
        enter(&reply, Pinhole::of(Pinhole::REPLY));
    }
    let pinhole = opened_conversation(socket, namespace, &headers, ports, &in_force, lookups);
    if pinhole.via != 0 {
        let flow = FlowKey {
            source: headers.source,
            destination: headers.destination,
            source_port: ports.source,
            destination_port: ports.destination,
        };
        enter(&flow, pinhole);
    }
}

/// Whether a guarded port sends: what comes back is a reply.
#[inline(always)]
fn is_guarded_sender<S: PacketSocket, L: Lookups>(
    socket: &S,
    namespace: Namespace,
    headers: &Headers,
    ports: Ports,
    in_force: &RulesetInForce,
    lookups: &L,
) -> bool {
    let guards = |scope| udp_port(scope, ports.source, in_force, lookups).is_some();
    match namespace {
        Namespace::Node => guards(ScopeValue::NODE),
        Namespace::Pod | Namespace::Unknown => match set_of(headers.source, in_force, lookups) {
            Some(set) => guards(set),
            None if in_pods(namespace, in_force, |level| socket.cgroup_at(level)) => guards(ScopeValue::ALL_PODS),
            None => guards(ScopeValue::NODE),
        },
    }
}

/// Who opens a conversation with a port that may be a guarded port of this node: the node itself, a caller, or neither.
#[inline(always)]
fn opened_conversation<S: PacketSocket, L: Lookups + CgroupLookups>(
    socket: &S,
    namespace: Namespace,
    headers: &Headers,
    ports: Ports,
    in_force: &RulesetInForce,
    lookups: &L,
) -> Pinhole {
    let flags = [Some(ScopeValue::NODE), set_of(headers.destination, in_force, lookups), Some(ScopeValue::ALL_PODS)]
        .into_iter()
        .flatten()
        .filter_map(|scope| udp_port(scope, ports.destination, in_force, lookups))
        .fold(0, |flags, port| flags | port.flags);
    let mut pinhole = Pinhole::default();
    if flags & PortValue::ALLOW_NODE != 0 && matches!(namespace, Namespace::Node) {
        pinhole.via |= Pinhole::NODE;
    }
    if flags & PortValue::ALLOW_CALLER != 0 {
        let caller = local_caller(socket, in_force, lookups);
        if caller.roles != 0 {
            pinhole = Pinhole { via: pinhole.via | Pinhole::CALLER, at: 0, cgroup: caller.cgroup };
        }
    }
    pinhole
}

#[inline(always)]
fn udp_port<L: Lookups>(scope: u32, port: [u8; 2], in_force: &RulesetInForce, lookups: &L) -> Option<PortValue> {
    let generation = in_force.key_generation();
    lookups.port(&PortKey { scope, port: u16::from_be_bytes(port), protocol: UDP, generation })
}

#[inline(always)]
fn set_of<L: Lookups>(address: crate::abi::Address, in_force: &RulesetInForce, lookups: &L) -> Option<u32> {
    let key = ScopeKey { generation: [in_force.key_generation(), 0, 0, 0], address };
    lookups.scope(&key).map(|value| value.scope)
}
