//! Owns the rule of the house for a packet that reaches a guarded socket: pinhole, then peer, else deny.
//! Called by guard-ebpf for every packet to a listening socket, and by the host for tests and explanations: the same code.
//! Must never look at anything but its arguments, and never admit what it could not read or find.

use crate::{
    abi::{
        CallerKey, CallerValue, FlowKey, NO_RULE, PeerKey4, PeerKey6, PeerValue, Pinhole, PortKey, PortValue, ScopeKey,
        ScopeValue, list_bytes,
    },
    in_force::InForce,
    packet::{Packet, PacketBytes, parse, unmapped},
    verdict::{Decision, Reason, Verdict},
};

/// Whose network namespace a listener is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The node's own.
    Node,
    /// Some other one: a pod's.
    Pod,
    /// The kernel has no helper to tell (before 6.15): the destination address decides, and what is no pod's is the node's.
    Unknown,
}

/// The socket that a packet is for: a TCP listener or an unconnected UDP socket. Its port is the guarded port: no packet shape can hide it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Whose it is.
    pub scope: Scope,
    /// The port it listens on, host order.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// Whether it is in the cgroup that pods live in. Only asked for where a rule guards ports of every pod.
    pub in_pods: bool,
}

/// The look-ups that a decision makes. The kernel implements them over its maps, the host over ordinary collections.
pub trait Tables {
    /// The epoch in force and the generation of its keys.
    fn in_force(&self) -> InForce;
    /// The longest prefix that holds this destination.
    fn scope(&self, key: &ScopeKey) -> Option<ScopeValue>;
    /// The guarded port.
    fn port(&self, key: &PortKey) -> Option<PortValue>;
    /// Whether a port of this number is guarded anywhere. Asked before the copies are: most ports are not.
    fn is_guarded_number(&self, generation: u8, port: u16) -> bool;
    /// The same as `scope`, from the copy of that table.
    fn scope_copy(&self, key: &ScopeKey) -> Option<ScopeValue>;
    /// The same as `port`, from the copy of that table.
    fn port_copy(&self, key: &PortKey) -> Option<PortValue>;
    /// The pinhole of exactly this TCP flow, or the UDP conversation that it belongs to and that has not run out.
    fn pinhole(&self, protocol: u8, key: &FlowKey) -> Option<Pinhole>;
    /// A cgroup that a peer list admits.
    fn caller(&self, key: &CallerKey) -> Option<CallerValue>;
    /// The longest prefix of an IPv4 peer list that holds this source.
    fn peer_v4(&self, key: &PeerKey4) -> Option<PeerValue>;
    /// The longest prefix of an IPv6 peer list that holds this source.
    fn peer_v6(&self, key: &PeerKey6) -> Option<PeerValue>;
}

/// Decides about one packet for a guarded socket.
#[inline(always)]
pub fn decide<B: PacketBytes + ?Sized, T: Tables>(bytes: &B, listener: Listener, tables: &T) -> Decision {
    let in_force @ InForce { epoch, .. } = tables.in_force();
    let unread = FlowKey { destination_port: listener.port.to_be_bytes(), ..FlowKey::default() };
    let conclude = |reason: Reason, rule: u16, port: PortValue, flow: FlowKey| {
        let audited = matches!(reason.verdict(), Verdict::Deny) && port.flags & PortValue::AUDIT != 0;
        let verdict = if audited { Verdict::Allow } else { reason.verdict() };
        Decision { verdict, reason, rule, audited, epoch, flow }
    };

    // The node's own port is known without reading the packet; a pod's is found by the destination address.
    let mut found = match listener.scope {
        Scope::Node => guarded(listener, None, in_force, tables),
        Scope::Pod | Scope::Unknown => Guarded::NOT,
    };
    if matches!((listener.scope, found.by), (Scope::Node, By::Nothing)) {
        return conclude(Reason::NotGuarded, NO_RULE, PortValue::default(), unread);
    }
    let Some(packet) = parse(bytes, listener.protocol) else {
        return conclude(Reason::BadHeader, found.port.rule, found.port, unread);
    };
    let flow = FlowKey {
        source: packet.source,
        destination: packet.destination,
        source_port: packet.ports.map_or([0; 2], |ports| ports.source),
        destination_port: listener.port.to_be_bytes(),
    };
    if !matches!(listener.scope, Scope::Node) {
        found = guarded(listener, Some(&packet), in_force, tables);
    }
    let Guarded { port, generation, by } = found;
    match by {
        By::Tables => {}
        By::CopiesAlone => return conclude(Reason::TableDamaged, port.rule, port, flow),
        By::Nothing => return conclude(Reason::NotGuarded, NO_RULE, PortValue::default(), flow),
    }

    let list = list_bytes(generation, port.list);
    // None is one that nothing opened, and not an `Option`: the kernel's verifier loses track of what has no value on some way.
    let Pinhole { via, cgroup, .. } = match packet.ports {
        Some(_) => tables.pinhole(listener.protocol, &flow).unwrap_or_default(),
        None => Pinhole::default(),
    };
    if via & Pinhole::REPLY != 0 {
        return conclude(Reason::Reply, port.rule, port, flow);
    }
    if via & Pinhole::TUNNEL != 0 && port.flags & PortValue::ALLOW_TUNNEL != 0 {
        return conclude(Reason::Tunnel, port.tunnel_rule, port, flow);
    }
    if via & Pinhole::NODE != 0 && port.flags & PortValue::ALLOW_NODE != 0 {
        return conclude(Reason::Node, port.node_rule, port, flow);
    }
    if via & Pinhole::CALLER != 0
        && let Some(caller) = tables.caller(&CallerKey { cgroup, list, reserved: 0 })
    {
        return conclude(Reason::Caller, caller.rule as u16, port, flow);
    }
    let peer = if packet.is_v4 {
        tables.peer_v4(&PeerKey4 { list, address: unmapped(&packet.source) })
    } else {
        tables.peer_v6(&PeerKey6 { list, address: packet.source })
    };
    match peer {
        Some(PeerValue { rule, kind: PeerValue::ALLOW }) => conclude(Reason::IpBlock, rule, port, flow),
        Some(PeerValue { rule, kind: PeerValue::EXCEPT }) => conclude(Reason::Except, rule, port, flow),
        Some(_) | None if opened(via) => conclude(Reason::PinholeNotAllowed, port.rule, port, flow),
        Some(_) | None => conclude(Reason::NoSelector, port.rule, port, flow),
    }
}

/// What says that a port is guarded.
#[derive(Clone, Copy)]
enum By {
    /// The tables, which say who may reach it too.
    Tables,
    /// Their copies, and not they.
    CopiesAlone,
    /// Nothing does.
    Nothing,
}

/// A port as far as it is guarded. Every field always has a value: the kernel's verifier lets none be passed on that has not.
#[derive(Clone, Copy)]
struct Guarded {
    port: PortValue,
    generation: u8,
    by: By,
}

impl Guarded {
    const NOT: Guarded = Guarded {
        port: PortValue { list: 0, rule: NO_RULE, tunnel_rule: NO_RULE, node_rule: NO_RULE, flags: 0 },
        generation: 0,
        by: By::Nothing,
    };
}

/// What guards the listener's port, its scope being the node's or that of the packet's destination. That nothing does is believed only
/// where the copies say so too: an entry that somebody took out opens nothing.
#[inline(always)]
fn guarded<T: Tables>(listener: Listener, packet: Option<&Packet>, in_force: InForce, tables: &T) -> Guarded {
    let Listener { port, protocol, .. } = listener;
    if let Some(generation) = in_force.generation {
        let scope = scope_of(listener, packet, generation, |key| tables.scope(key));
        if let Some(port) = scope.and_then(|scope| tables.port(&PortKey { scope, port, protocol, generation })) {
            return Guarded { port, generation, by: By::Tables };
        }
    }
    let (first, last) = match in_force.generation {
        Some(generation) => (generation, generation),
        None => (0, 1),
    };
    let mut generation = first;
    while generation <= last {
        if tables.is_guarded_number(generation, port)
            && let Some(scope) = scope_of(listener, packet, generation, |key| tables.scope_copy(key))
            && let Some(port) = tables.port_copy(&PortKey { scope, port, protocol, generation })
        {
            return Guarded { port, generation, by: By::CopiesAlone };
        }
        generation = generation.wrapping_add(1);
    }
    Guarded::NOT
}

/// The scope of the listener: the node's, or that of the destination address; `None` where no rule names the address.
#[inline(always)]
fn scope_of(
    listener: Listener,
    packet: Option<&Packet>,
    generation: u8,
    look_up: impl Fn(&ScopeKey) -> Option<ScopeValue>,
) -> Option<u32> {
    let Some(packet) = packet else { return Some(ScopeValue::NODE) };
    let key = ScopeKey { generation: [generation, 0, 0, 0], address: packet.destination };
    match (listener.scope, look_up(&key)) {
        (Scope::Pod, Some(ScopeValue { scope })) if scope != ScopeValue::NODE => Some(scope),
        (Scope::Unknown | Scope::Node, Some(ScopeValue { scope })) => Some(scope),
        (Scope::Pod, Some(_) | None) | (Scope::Unknown | Scope::Node, None) if listener.in_pods => {
            Some(ScopeValue::ALL_PODS)
        }
        (Scope::Pod, Some(_) | None) => None,
        (Scope::Unknown | Scope::Node, None) => Some(ScopeValue::NODE),
    }
}

/// Whether a pinhole tells of somebody who opened the connection on this node.
#[inline(always)]
fn opened(via: u32) -> bool {
    via & !Pinhole::SERVED != 0
}
