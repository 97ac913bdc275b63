//! Owns the rule of the house for a packet that reaches a guarded socket: pinhole, then peer, otherwise deny.
//! Called by guard-ebpf for every packet to a listening socket, and by the host for tests and open connections: the same code.
//! Must never look at anything but its arguments, and never admit what it could not read or find.

use crate::{
    abi::{
        Address, AskedKey, CallerKey, FlowKey, Generation, NO_RULE, NamespaceKey, NamespaceValue, PeerKey4, PeerKey6,
        PeerValue, Pinhole, PortKey, PortValue, ScopeKey, ScopeValue, SentDatagram, list_bytes,
    },
    in_force::RulesetInForce,
    listener::{Listener, Namespace, in_pods},
    lookups::{Lookups, PacketSocket},
    packet::{PacketBytes, UDP, parse, unmapped},
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
        let outcome = Concluded { reason: Reason::NotGuarded, rule: NO_RULE, audits: false };
        return outcome.decision(unread(port), &in_force);
    }
    let (namespace, netns) = socket.namespace();
    let listener = Listener {
        namespace,
        netns,
        socket: if protocol == UDP { socket.cookie() } else { 0 },
        port,
        protocol,
        over_loopback: socket.interface() == Listener::LOOPBACK_INTERFACE,
    };
    decide(bytes, listener, || in_pods(&in_force, |level| socket.cgroup_at(level)), &in_force, lookups)
}

/// Decides about a packet to a listener under the ruleset in force. `in_pods` says whether the listener counts as inside the pods' cgroup;
/// it is asked once, unless the listener is the node's.
#[inline(always)]
pub fn decide<B: PacketBytes + ?Sized, L: Lookups>(
    bytes: &B,
    listener: Listener,
    in_pods: impl FnOnce() -> bool,
    in_force: &RulesetInForce,
    lookups: &L,
) -> Decision {
    let is_node = matches!(listener.namespace, Namespace::Node);
    // The node's own port is found without reading the packet.
    let node = match listener.namespace {
        Namespace::Node | Namespace::Unknown => guarded(Whose::Node, listener, &[0; 16], in_force, lookups),
        Namespace::Pod => Guarded::NOT,
    };
    let mut flow = unread(listener.port);
    let mut outcome = Concluded { reason: Reason::NotGuarded, rule: NO_RULE, audits: false };
    if is_node && matches!(node.by, By::Nothing) {
        return outcome.decision(flow, in_force);
    }
    let Some(headers) = parse(bytes, listener.protocol) else {
        // Without a destination it cannot be told which rule of a pod only audits.
        let audits = is_node && node.port.flags & PortValue::AUDIT != 0;
        return Concluded { reason: Reason::BadHeader, rule: node.port.rule, audits }.decision(flow, in_force);
    };
    (flow.source, flow.destination) = (headers.source, headers.destination);
    flow.source_port = headers.ports.map_or([0; 2], |ports| ports.source);
    let (is_v4, has_ports) = (headers.is_v4, headers.ports.is_some());
    // Once and not where it decides: the verifier follows every path through the loop over the levels.
    let pod = if is_node {
        Guarded::NOT
    } else {
        guarded(Whose::Pod { in_pods: in_pods() }, listener, &flow.destination, in_force, lookups)
    };
    let first = if matches!(node.by, By::Nothing) { pod } else { node };
    if matches!(first.by, By::Nothing) {
        return outcome.decision(flow, in_force);
    }
    if matches!(listener.namespace, Namespace::Pod) && listener.over_loopback {
        return first.concluded((Reason::OwnNamespace, first.port.rule)).decision(flow, in_force);
    }
    // A packet without a readable port has no past.
    let past = match (has_ports, listener.protocol) {
        (false, _) => Past { via: 0, cgroup: 0, is_reply: false },
        (true, UDP) => sent_here(&listener, &flow, lookups),
        (true, _) => {
            let Pinhole { via, cgroup, .. } = lookups.pinhole(&flow).unwrap_or_default();
            Past { via, cgroup, is_reply: false }
        }
    };
    outcome = first.concluded(admit(&first, past, is_v4, &flow.source, lookups));
    // Whose listener it is cannot be told: each of the two has to admit.
    let by_both = !matches!(node.by, By::Nothing) && !matches!(pod.by, By::Nothing);
    if by_both && !outcome.denies() {
        outcome = admit_too(&pod, past, is_v4, &flow.source, lookups);
    }
    outcome.decision(flow, in_force)
}

/// What a decision came to, before it is put together.
#[derive(Clone, Copy)]
struct Concluded {
    reason: Reason,
    rule: u16,
    /// Whether the rule only audits.
    audits: bool,
}

impl Concluded {
    #[inline(always)]
    fn denies(self) -> bool {
        matches!(self.reason.verdict(), Verdict::Deny) && !self.audits
    }

    #[inline(always)]
    fn decision(self, flow: FlowKey, in_force: &RulesetInForce) -> Decision {
        let Concluded { reason, rule, audits } = self;
        let audited = matches!(reason.verdict(), Verdict::Deny) && audits;
        let verdict = if audited { Verdict::Allow } else { reason.verdict() };
        Decision { verdict, reason, rule, audited, epoch: in_force.epoch, flow }
    }
}

/// What a socket of this node did before this packet.
#[derive(Clone, Copy)]
struct Past {
    /// A set of `Pinhole::*`.
    via: u32,
    /// The named cgroup of a caller.
    cgroup: u64,
    /// Whether the packet answers what the listener itself asked.
    is_reply: bool,
}

/// What a socket of this node did before this datagram. A function of its own in the kernel, because a program's stack is small.
#[inline(never)]
fn sent_here<L: Lookups>(listener: &Listener, flow: &FlowKey, lookups: &L) -> Past {
    let key = AskedKey { socket: listener.socket, address: flow.source, port: flow.source_port, reserved: [0; 6] };
    let mut past = Past { via: 0, cgroup: 0, is_reply: lookups.asked(&key) };
    if let Some(SentDatagram { cgroup, netns, via, .. }) = lookups.sent(flow) {
        // What was sent in the listener's own namespace comes in over loopback, and nothing else does: a packet from elsewhere with the
        // same addresses is not the one that was sent.
        if (netns == listener.netns) == listener.over_loopback {
            (past.via, past.cgroup) = (via, cgroup);
        }
    }
    past
}

/// Whether what guards the port admits the packet: why, and the rule that is counted.
#[inline(always)]
fn admit<L: Lookups>(guarded: &Guarded, past: Past, is_v4: bool, source: &Address, lookups: &L) -> (Reason, u16) {
    let Guarded { port, generation, by } = guarded;
    if matches!(by, By::CopiesAlone) {
        return (Reason::TableDamaged, port.rule);
    }
    let list = list_bytes(*generation, port.list);
    let Past { via, cgroup, is_reply } = past;
    if is_reply {
        return (Reason::Reply, port.rule);
    }
    if via & Pinhole::TUNNEL != 0 && port.flags & PortValue::ALLOW_TUNNEL != 0 {
        return (Reason::Tunnel, port.tunnel_rule);
    }
    if via & Pinhole::NODE != 0 && port.flags & PortValue::ALLOW_NODE != 0 {
        return (Reason::Node, port.node_rule);
    }
    if via & Pinhole::CALLER != 0
        && let Some(caller) = lookups.caller(&CallerKey { cgroup, list, reserved: 0 })
    {
        return (Reason::Caller, caller.rule as u16);
    }
    let peer = if is_v4 {
        lookups.peer_v4(&PeerKey4 { list, address: unmapped(source) })
    } else {
        lookups.peer_v6(&PeerKey6 { list, address: *source })
    };
    match peer {
        Some(PeerValue { rule, kind: PeerValue::ALLOW }) => (Reason::IpBlock, rule),
        Some(PeerValue { rule, kind: PeerValue::EXCEPT }) => (Reason::Except, rule),
        Some(_) | None if via != 0 => (Reason::PinholeNotAllowed, port.rule),
        Some(_) | None => (Reason::NoSelector, port.rule),
    }
}

/// The same once more. A function of its own in the kernel: it is rare, and a program's stack is small.
#[inline(never)]
fn admit_too<L: Lookups>(guarded: &Guarded, past: Past, is_v4: bool, source: &Address, lookups: &L) -> Concluded {
    guarded.concluded(admit(guarded, past, is_v4, source, lookups))
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

    /// A reason and the rule that is counted, in the mode of the port.
    #[inline(always)]
    fn concluded(&self, (reason, rule): (Reason, u16)) -> Concluded {
        Concluded { reason, rule, audits: self.port.flags & PortValue::AUDIT != 0 }
    }
}

/// Which copy of the tables is asked.
#[derive(Clone, Copy)]
enum Tables {
    First,
    Copy,
}

/// As whose a listener is judged.
#[derive(Clone, Copy)]
enum Whose {
    Node,
    Pod {
        /// Whether it counts as inside the pods' cgroup.
        in_pods: bool,
    },
}

/// What guards the listener's port. A port counts as not guarded only if the copies of the tables agree: removing an entry from
/// the tables opens nothing.
#[inline(always)]
fn guarded<L: Lookups>(
    whose: Whose,
    listener: Listener,
    destination: &Address,
    in_force: &RulesetInForce,
    lookups: &L,
) -> Guarded {
    let Listener { port, protocol, netns, .. } = listener;
    if let Some(generation) = in_force.generation
        && let Some(scope) = scope(whose, netns, destination, generation, Tables::First, lookups)
        && let Some(port) = lookups.port(&PortKey { scope, port, protocol, generation })
    {
        return Guarded { port, generation, by: By::Tables };
    }
    let (first, last) = match in_force.generation {
        Some(generation) => (generation, generation),
        None => (0, 1),
    };
    let mut generation = first;
    while generation <= last {
        if lookups.is_guarded_number(generation, port)
            && let Some(scope) = scope(whose, netns, destination, generation, Tables::Copy, lookups)
            && let Some(port) = lookups.port_copy(&PortKey { scope, port, protocol, generation })
        {
            return Guarded { port, generation, by: By::CopiesAlone };
        }
        generation = generation.wrapping_add(1);
    }
    Guarded::NOT
}

/// The scope of a listener. A pod's is that of its network namespace, if its addresses are known; then it does not matter to which of them the
/// packet came. Otherwise that of the destination, and at an address in no prefix the one that only admits what every rule for pods admits.
#[inline(always)]
fn scope<L: Lookups>(
    whose: Whose,
    netns: u64,
    destination: &Address,
    generation: u8,
    tables: Tables,
    lookups: &L,
) -> Option<u32> {
    let Whose::Pod { in_pods } = whose else { return Some(ScopeValue::NODE) };
    let key = NamespaceKey { netns, generation: u64::from(generation) };
    let known = lookups.namespace_scope(&key).map(|NamespaceValue { scope }| scope);
    if let Some(scope) = known
        && scope != ScopeValue::ALL_PODS
    {
        return Some(scope);
    }
    // Also where no address of the pod was in a prefix: it may have got this one since.
    let key = ScopeKey { generation: [generation, 0, 0, 0], address: *destination };
    let found = match tables {
        Tables::First => lookups.scope(&key),
        Tables::Copy => lookups.scope_copy(&key),
    };
    match found {
        Some(ScopeValue { scope }) if scope != ScopeValue::NODE => Some(scope),
        Some(_) | None if in_pods => Some(known.unwrap_or(ScopeValue::OTHER_PODS)),
        Some(_) | None => None,
    }
}

/// The flow of a packet that was not read: its port is the listener's.
#[inline(always)]
fn unread(port: u16) -> FlowKey {
    FlowKey { destination_port: port.to_be_bytes(), ..FlowKey::default() }
}

#[cfg(test)]
#[path = "scope_tests.rs"]
mod scope_tests;
#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
