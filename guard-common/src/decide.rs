//! Owns the rule of the house for a packet that reaches a guarded socket: pinhole, then peer, otherwise deny.
//! Called by guard-ebpf for every packet to a listening socket, and by the host for tests and open connections: the same code.
//! Must never look at anything but its arguments, and never admit what it could not read or find.

use crate::{
    abi::{
        CallerKey, FlowKey, Generation, NO_RULE, PeerKey4, PeerKey6, PeerValue, Pinhole, PortKey, PortValue, ScopeKey,
        ScopeValue, list_bytes,
    },
    in_force::RulesetInForce,
    listener::{Listener, Namespace, in_pods},
    lookups::{Lookups, PacketSocket},
    packet::{Headers, PacketBytes, UDP, parse, unmapped},
    verdict::{Reason, Verdict},
};

/// The whole answer of [`decide`]: everything that is needed to act, to count and to report.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens to the packet. In audit mode this is `Allow` although the reason is one of denial.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The slot of the rule that is counted; [`NO_RULE`] if no rule was reached.
    pub rule: u16,
    /// Whether the rule only audits: the reason would have denied, and the packet goes on.
    pub audited: bool,
    /// The epoch of the ruleset that decided.
    pub epoch: u32,
    /// The flow, as far as the packet was read; the rest is zero.
    pub flow: FlowKey,
}

/// Decides about a packet to a TCP listener or an unconnected UDP socket: the whole walk of the ingress hook. Reads the ruleset in force.
#[inline(always)]
pub fn judge_packet<S: PacketSocket, B: PacketBytes + ?Sized, L: Lookups>(
    socket: &S,
    port: u16,
    protocol: u8,
    bytes: &B,
    lookups: &L,
) -> Decision {
    let in_force = RulesetInForce::read(lookups);
    if protocol == UDP && !in_force.has(Generation::UDP) {
        return Decision {
            verdict: Verdict::Allow,
            reason: Reason::NotGuarded,
            rule: NO_RULE,
            audited: false,
            epoch: in_force.epoch,
            flow: unread(port),
        };
    }
    let namespace = socket.namespace();
    let in_pods = in_pods(namespace, &in_force, |level| socket.cgroup_at(level));
    decide(bytes, Listener { namespace, port, protocol, in_pods }, &in_force, lookups)
}

/// Decides about a packet to a listener under the ruleset in force.
#[inline(always)]
pub fn decide<B: PacketBytes + ?Sized, L: Lookups>(
    bytes: &B,
    listener: Listener,
    in_force: &RulesetInForce,
    lookups: &L,
) -> Decision {
    let conclude = |reason: Reason, rule: u16, port: PortValue, flow: FlowKey| {
        let audited = matches!(reason.verdict(), Verdict::Deny) && port.flags & PortValue::AUDIT != 0;
        let verdict = if audited { Verdict::Allow } else { reason.verdict() };
        Decision { verdict, reason, rule, audited, epoch: in_force.epoch, flow }
    };

    // The node's own port is found without reading the packet, a pod's by the destination address.
    let mut found = match listener.namespace {
        Namespace::Node => guarded(listener, None, in_force, lookups),
        Namespace::Pod | Namespace::Unknown => Guarded::NOT,
    };
    if matches!((listener.namespace, found.by), (Namespace::Node, By::Nothing)) {
        return conclude(Reason::NotGuarded, NO_RULE, PortValue::default(), unread(listener.port));
    }
    let Some(headers) = parse(bytes, listener.protocol) else {
        return conclude(Reason::BadHeader, found.port.rule, found.port, unread(listener.port));
    };
    let flow = FlowKey {
        source: headers.source,
        destination: headers.destination,
        source_port: headers.ports.map_or([0; 2], |ports| ports.source),
        destination_port: listener.port.to_be_bytes(),
    };
    if !matches!(listener.namespace, Namespace::Node) {
        found = guarded(listener, Some(&headers), in_force, lookups);
    }
    let Guarded { port, generation, by } = found;
    match by {
        By::Tables => {}
        By::CopiesAlone => return conclude(Reason::TableDamaged, port.rule, port, flow),
        By::Nothing => return conclude(Reason::NotGuarded, NO_RULE, PortValue::default(), flow),
    }

    let list = list_bytes(generation, port.list);
    // No pinhole is the default value and not `None`: the verifier rejects a value that is set on some paths only.
    let Pinhole { via, cgroup, .. } = match headers.ports {
        Some(_) => lookups.pinhole(listener.protocol, &flow).unwrap_or_default(),
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
        && let Some(caller) = lookups.caller(&CallerKey { cgroup, list, reserved: 0 })
    {
        return conclude(Reason::Caller, caller.rule as u16, port, flow);
    }
    let peer = if headers.is_v4 {
        lookups.peer_v4(&PeerKey4 { list, address: unmapped(&headers.source) })
    } else {
        lookups.peer_v6(&PeerKey6 { list, address: headers.source })
    };
    match peer {
        Some(PeerValue { rule, kind: PeerValue::ALLOW }) => conclude(Reason::IpBlock, rule, port, flow),
        Some(PeerValue { rule, kind: PeerValue::EXCEPT }) => conclude(Reason::Except, rule, port, flow),
        Some(_) | None if opened(via) => conclude(Reason::PinholeNotAllowed, port.rule, port, flow),
        Some(_) | None => conclude(Reason::NoSelector, port.rule, port, flow),
    }
}

/// Where it is written that a port is guarded.
#[derive(Clone, Copy)]
enum By {
    /// The tables, which also say who may reach it.
    Tables,
    /// Only the copies of the tables.
    CopiesAlone,
    /// Nothing.
    Nothing,
}

/// What guards a port, if anything does. Every field is initialised because the verifier rejects uninitialised reads.
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

/// What guards the listener's port. The scope is the node's without a packet, otherwise that of its destination. A port counts as not
/// guarded only if the copies of the tables agree: removing an entry from the tables opens nothing.
#[inline(always)]
fn guarded<L: Lookups>(
    listener: Listener,
    headers: Option<&Headers>,
    in_force: &RulesetInForce,
    lookups: &L,
) -> Guarded {
    let Listener { port, protocol, .. } = listener;
    if let Some(generation) = in_force.generation {
        let scope = scope_of(listener, headers, generation, |key| lookups.scope(key));
        if let Some(port) = scope.and_then(|scope| lookups.port(&PortKey { scope, port, protocol, generation })) {
            return Guarded { port, generation, by: By::Tables };
        }
    }
    let (first, last) = match in_force.generation {
        Some(generation) => (generation, generation),
        None => (0, 1),
    };
    let mut generation = first;
    while generation <= last {
        if lookups.is_guarded_number(generation, port)
            && let Some(scope) = scope_of(listener, headers, generation, |key| lookups.scope_copy(key))
            && let Some(port) = lookups.port_copy(&PortKey { scope, port, protocol, generation })
        {
            return Guarded { port, generation, by: By::CopiesAlone };
        }
        generation = generation.wrapping_add(1);
    }
    Guarded::NOT
}

/// The scope of the listener: the node's, or that of the destination address; `None` if no rule names the address.
#[inline(always)]
fn scope_of(
    listener: Listener,
    headers: Option<&Headers>,
    generation: u8,
    look_up: impl Fn(&ScopeKey) -> Option<ScopeValue>,
) -> Option<u32> {
    let Some(headers) = headers else { return Some(ScopeValue::NODE) };
    let key = ScopeKey { generation: [generation, 0, 0, 0], address: headers.destination };
    match (listener.namespace, look_up(&key)) {
        (Namespace::Pod, Some(ScopeValue { scope })) if scope != ScopeValue::NODE => Some(scope),
        (Namespace::Unknown | Namespace::Node, Some(ScopeValue { scope })) => Some(scope),
        (Namespace::Pod, Some(_) | None) | (Namespace::Unknown | Namespace::Node, None) if listener.in_pods => {
            Some(ScopeValue::ALL_PODS)
        }
        (Namespace::Pod, Some(_) | None) => None,
        (Namespace::Unknown | Namespace::Node, None) => Some(ScopeValue::NODE),
    }
}

/// Whether a pinhole says that the connection was opened on this node.
#[inline(always)]
fn opened(via: u32) -> bool {
    via & !Pinhole::SERVED != 0
}

/// The flow of a packet that was not read: its port is the listener's.
#[inline(always)]
fn unread(port: u16) -> FlowKey {
    FlowKey { destination_port: port.to_be_bytes(), ..FlowKey::default() }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
