//! Owns the tests of the decision as a whole: what holds for every packet and every table.
//! Called by the test runner.
//! Must never repeat the decision's own logic as its oracle.

use proptest::prelude::*;

use super::*;
use crate::{
    abi::{
        AskedKey, CallerKey, CallerValue, FlowKey, NamespaceKey, NamespaceValue, OPENER_SLOTS, PeerKey4, PeerKey6,
        PeerValue, Pinhole, PortKey, PortValue, ScopeKey, ScopeValue, SentDatagram, Spoken, counter_index, opener_slot,
    },
    in_force::RulesetSwitch,
    packet::mapped,
};

/// Every look-up answers with one fixed value.
#[derive(Clone, Copy, Default)]
struct Fixed {
    scope: Option<u32>,
    port: Option<PortValue>,
    pinhole: Option<u32>,
    peer: Option<u16>,
    caller: bool,
    /// No generation is whole.
    doubt: bool,
    scope_copy: Option<u32>,
    port_copy: Option<PortValue>,
    namespace: Option<u32>,
    sent: Option<SentDatagram>,
    /// The socket that asked.
    asked: Option<u64>,
}

impl RulesetSwitch for Fixed {
    fn active(&self) -> u32 {
        1
    }
    fn generation(&self, number: u8) -> Generation {
        Generation { epoch: if number == 1 && !self.doubt { 1 } else { 0 }, ..Generation::default() }
    }
}

impl Lookups for Fixed {
    fn scope(&self, _: &ScopeKey) -> Option<ScopeValue> {
        self.scope.map(|scope| ScopeValue { scope })
    }
    fn port(&self, _: &PortKey) -> Option<PortValue> {
        self.port
    }
    fn is_guarded_number(&self, _: u8, _: u16) -> bool {
        self.port_copy.is_some()
    }
    fn scope_copy(&self, _: &ScopeKey) -> Option<ScopeValue> {
        self.scope_copy.map(|scope| ScopeValue { scope })
    }
    fn port_copy(&self, _: &PortKey) -> Option<PortValue> {
        self.port_copy
    }
    fn namespace_scope(&self, _: &NamespaceKey) -> Option<NamespaceValue> {
        self.namespace.map(|scope| NamespaceValue { scope })
    }
    fn pinhole(&self, _: &FlowKey) -> Option<Pinhole> {
        self.pinhole.map(Pinhole::of)
    }
    fn sent(&self, _: &FlowKey) -> Option<SentDatagram> {
        self.sent
    }
    fn asked(&self, key: &AskedKey) -> bool {
        self.asked == Some(key.socket)
    }
    fn caller(&self, _: &CallerKey) -> Option<CallerValue> {
        self.caller.then_some(CallerValue { rule: 1 })
    }
    fn peer_v4(&self, _: &PeerKey4) -> Option<PeerValue> {
        self.peer.map(|kind| PeerValue { rule: 1, kind })
    }
    fn peer_v6(&self, _: &PeerKey6) -> Option<PeerValue> {
        self.peer.map(|kind| PeerValue { rule: 1, kind })
    }
}

/// Decides under the ruleset in force of these tables, about a listener that counts as inside the pods' cgroup.
fn decide<L: Lookups>(bytes: &[u8], listener: Listener, tables: &L) -> Decision {
    super::decide(bytes, listener, || true, &RulesetInForce::read(tables), tables)
}

const NODE: Listener = Listener::of_node(10_250, 6);

fn packet() -> impl Strategy<Value = Vec<u8>> {
    let edges = prop::sample::select(vec![0x45u8, 0x44, 0x46, 0x4f, 0x60, 0x00, 0xf0]);
    (edges, prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(first, mut rest)| {
        if let Some(byte) = rest.first_mut() {
            *byte = first;
        }
        rest
    })
}

pub(super) fn syn_v4() -> Vec<u8> {
    let mut bytes = vec![0u8; 40];
    bytes[0] = 0x45;
    bytes[9] = 6;
    bytes[12..16].copy_from_slice(&[10, 0, 0, 1]);
    bytes[16..20].copy_from_slice(&[10, 0, 0, 2]);
    bytes[20..22].copy_from_slice(&[0x9c, 0x40]);
    bytes
}

proptest! {
    #[test]
    fn a_guarded_port_with_an_empty_list_admits_nobody(bytes in packet(), flags in 0u16..4, scope in 0usize..3) {
        let tables = Fixed { scope: Some(1), port: Some(PortValue { flags, ..PortValue::default() }), ..Fixed::default() };
        let namespace = [Namespace::Node, Namespace::Pod, Namespace::Unknown][scope];
        let decision = decide(bytes.as_slice(), Listener { namespace, ..NODE }, &tables);
        prop_assert_eq!(decision.verdict, Verdict::Deny);
    }

    #[test]
    fn what_cannot_be_read_is_never_admitted_to_a_guarded_port(bytes in packet(), peer in 0u16..4, pinhole in 0u32..64, caller in any::<bool>()) {
        let port = PortValue { flags: PortValue::ALLOW_TUNNEL | PortValue::ALLOW_NODE, ..PortValue::default() };
        let tables = Fixed { scope: Some(1), port: Some(port), pinhole: Some(pinhole), peer: Some(peer), caller, ..Fixed::default() };
        let decision = decide(bytes.as_slice(), NODE, &tables);
        if parse(bytes.as_slice(), 6).is_none() {
            prop_assert_eq!((decision.verdict, decision.reason), (Verdict::Deny, Reason::BadHeader));
        }
        if decision.verdict == Verdict::Allow {
            let opened = Pinhole::TUNNEL | Pinhole::NODE | if caller { Pinhole::CALLER } else { 0 };
            prop_assert!(peer == PeerValue::ALLOW || pinhole & opened != 0);
        }
    }

    #[test]
    fn audit_changes_the_verdict_and_nothing_else(bytes in packet(), peer in prop::option::of(0u16..4), pinhole in prop::option::of(0u32..32), flags in 0u16..4, caller in any::<bool>()) {
        let port = PortValue { flags, ..PortValue::default() };
        let enforced = Fixed { scope: Some(1), port: Some(port), pinhole, peer, caller, ..Fixed::default() };
        let audited = Fixed { port: Some(PortValue { flags: flags | PortValue::AUDIT, ..port }), ..enforced };
        let (enforced, audited) = (decide(bytes.as_slice(), NODE, &enforced), decide(bytes.as_slice(), NODE, &audited));
        prop_assert_eq!(audited.verdict, Verdict::Allow);
        prop_assert_eq!(audited.reason, enforced.reason);
        prop_assert_eq!(audited.audited, enforced.verdict == Verdict::Deny);
    }

    #[test]
    fn what_the_copies_alone_guard_admits_nobody(bytes in packet(), pinhole in prop::option::of(0u32..64), peer in prop::option::of(0u16..4), caller in any::<bool>(), doubt in any::<bool>(), scope in 0usize..3, lost in any::<bool>()) {
        // The port's entry is gone, or the scope's is, or no generation is whole, whatever the tables hold.
        let port = Some(PortValue::default());
        let (here, port) = if lost { (None, port) } else { (Some(1), None) };
        let tables = Fixed { scope: here, port: port.filter(|_| doubt), pinhole, peer, caller, doubt, scope_copy: Some(1), port_copy: Some(PortValue { rule: 3, ..PortValue::default() }), ..Fixed::default() };
        let namespace = [Namespace::Node, Namespace::Pod, Namespace::Unknown][scope];
        let decision = decide(bytes.as_slice(), Listener { namespace, ..NODE }, &tables);
        let readable = parse(bytes.as_slice(), 6).is_some();
        prop_assert_eq!(decision.verdict, Verdict::Deny);
        prop_assert_eq!(decision.reason, if readable { Reason::TableDamaged } else { Reason::BadHeader });
        // An audited port denies nothing, damaged or not.
        let audited = Fixed { port_copy: Some(PortValue { flags: PortValue::AUDIT, ..PortValue::default() }), ..tables };
        let decision = decide(bytes.as_slice(), Listener { namespace, ..NODE }, &audited);
        prop_assert_eq!(decision.verdict, if readable || namespace == Namespace::Node { Verdict::Allow } else { Verdict::Deny });
    }

    #[test]
    fn what_no_copy_guards_is_left_alone_in_doubt_too(bytes in packet(), doubt in any::<bool>(), scope in 0usize..3) {
        let namespace = [Namespace::Node, Namespace::Pod, Namespace::Unknown][scope];
        let decision = decide(bytes.as_slice(), Listener { namespace, ..NODE }, &Fixed { doubt, ..Fixed::default() });
        if parse(bytes.as_slice(), 6).is_some() || namespace == Namespace::Node {
            prop_assert_eq!(decision.reason, Reason::NotGuarded);
        }
    }
}

#[test]
fn a_pinhole_admits_only_where_the_rule_names_what_opened_it() {
    for (via, flag, reason) in [
        (Pinhole::TUNNEL, PortValue::ALLOW_TUNNEL, Reason::Tunnel),
        (Pinhole::NODE, PortValue::ALLOW_NODE, Reason::Node),
    ] {
        let with = |flags| Fixed {
            port: Some(PortValue { flags, ..PortValue::default() }),
            pinhole: Some(via),
            ..Fixed::default()
        };
        assert_eq!(decide(syn_v4().as_slice(), NODE, &with(flag)).reason, reason);
        assert_eq!(decide(syn_v4().as_slice(), NODE, &with(3 ^ flag)).reason, Reason::PinholeNotAllowed);
    }
}

#[test]
fn a_caller_is_admitted_by_its_cgroup_and_where_the_node_is_by_that() {
    let with = |via, flags, caller| Fixed {
        port: Some(PortValue { flags, ..PortValue::default() }),
        pinhole: Some(via),
        caller,
        ..Fixed::default()
    };
    for (via, flags, caller, reason) in [
        (Pinhole::CALLER, PortValue::ALLOW_CALLER, true, Reason::Caller),
        (Pinhole::CALLER, PortValue::ALLOW_CALLER, false, Reason::PinholeNotAllowed),
        (Pinhole::CALLER | Pinhole::NODE, PortValue::ALLOW_NODE, false, Reason::Node),
        (Pinhole::CALLER | Pinhole::NODE, PortValue::ALLOW_CALLER, true, Reason::Caller),
        (Pinhole::NODE, PortValue::ALLOW_CALLER, true, Reason::PinholeNotAllowed),
        (0, PortValue::ALLOW_CALLER, true, Reason::NoSelector),
    ] {
        assert_eq!(decide(syn_v4().as_slice(), NODE, &with(via, flags, caller)).reason, reason, "{via} {flags}");
    }
}

proptest! {
    #[test]
    fn a_pod_reaches_itself_and_the_node_does_not(flags in 0u16..16, peer in prop::option::of(0u16..4), protocol in prop::sample::select(vec![6u8, 17])) {
        let tables = Fixed { scope: Some(1), port: Some(PortValue { flags, ..PortValue::default() }), peer, ..Fixed::default() };
        let listener = Listener { over_loopback: true, protocol, netns: 9, ..NODE };
        let mut bytes = syn_v4();
        bytes[9] = protocol;
        let pod = decide(&bytes, Listener { namespace: Namespace::Pod, ..listener }, &tables);
        prop_assert_eq!((pod.verdict, pod.reason), (Verdict::Allow, Reason::OwnNamespace));
        for namespace in [Namespace::Node, Namespace::Unknown] {
            let decision = decide(&bytes, Listener { namespace, ..listener }, &tables);
            let elsewhere = decide(&bytes, Listener { namespace, over_loopback: false, ..listener }, &tables);
            prop_assert_eq!(decision, elsewhere);
        }
    }

    /// A datagram admits only as the one that was sent: in the sender's own namespace over loopback, in another one never so.
    #[test]
    fn a_sent_datagram_comes_the_way_it_was_sent(netns in 0u64..3, of_listener in 0u64..3, over_loopback: bool, node: bool) {
        let namespace = if node { Namespace::Node } else { Namespace::Unknown };
        let sent = SentDatagram { netns, via: Pinhole::NODE, ..SentDatagram::default() };
        let port = Some(PortValue { flags: PortValue::ALLOW_NODE, ..PortValue::default() });
        let tables = Fixed { port, sent: Some(sent), ..Fixed::default() };
        let listener = Listener { namespace, netns: of_listener, over_loopback, protocol: 17, ..NODE };
        let mut bytes = syn_v4();
        bytes[9] = 17;
        let decision = decide(&bytes, listener, &tables);
        prop_assert_eq!(decision.verdict == Verdict::Allow, (netns == of_listener) == over_loopback);
        // It opens nothing for TCP.
        prop_assert_eq!(decide(&syn_v4(), Listener { protocol: 6, ..listener }, &tables).verdict, Verdict::Deny);
    }
}

#[test]
fn only_the_socket_that_asked_gets_the_answer() {
    let tables = Fixed { port: Some(PortValue::default()), asked: Some(7), ..Fixed::default() };
    let mut bytes = syn_v4();
    bytes[9] = 17;
    let to = |socket| decide(&bytes, Listener { socket, protocol: 17, ..NODE }, &tables).reason;
    assert_eq!((to(7), to(8), to(0)), (Reason::Reply, Reason::NoSelector, Reason::NoSelector));
    // A fragment has no port, so nobody knows whose answer it is.
    bytes[6] = 0x20;
    assert_eq!(decide(&bytes, Listener { socket: 7, protocol: 17, ..NODE }, &tables).reason, Reason::NoSelector);
}

proptest! {
    #[test]
    fn who_has_spoken_counts_for_one_to_two_windows(at in 1_000u32..100_000_000, later in 0u32..1_000) {
        let noted = Spoken::window(at);
        prop_assert!(noted != 0 && !Spoken::counts(0, at + later));
        let counts = Spoken::counts(noted, at + later);
        prop_assert!(counts || later >= Spoken::WINDOW_SECONDS);
        prop_assert!(!counts || later < 2 * Spoken::WINDOW_SECONDS);
    }

    #[test]
    fn every_remote_side_has_a_slot(address: [u8; 16], port: [u8; 2]) {
        prop_assert!(Spoken::slot(&address, port) < Spoken::SLOTS);
    }
}

#[test]
fn a_fragment_has_no_pinhole() {
    let tables = Fixed {
        port: Some(PortValue { flags: PortValue::ALLOW_TUNNEL, ..PortValue::default() }),
        pinhole: Some(Pinhole::TUNNEL),
        ..Fixed::default()
    };
    let mut bytes = syn_v4();
    bytes[6] = 0x20;
    assert_eq!(decide(bytes.as_slice(), NODE, &tables).reason, Reason::NoSelector);
}

#[test]
fn the_flow_is_read_from_the_packet_and_its_port_from_the_listener() {
    let flow = decide(syn_v4().as_slice(), NODE, &Fixed { port: Some(PortValue::default()), ..Fixed::default() }).flow;
    assert_eq!(flow.source, mapped([10, 0, 0, 1]));
    assert_eq!(u16::from_be_bytes(flow.source_port), 40_000);
    assert_eq!(u16::from_be_bytes(flow.destination_port), 10_250);
}

#[test]
fn every_reason_has_its_own_index_name_and_counter() {
    let mut seen = std::collections::BTreeSet::new();
    for (index, reason) in Reason::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, index);
        assert_eq!(Reason::from_index(index as u8), Some(reason));
        for rule in [0, 1, crate::abi::NO_RULE, u16::MAX] {
            for audited in [false, true] {
                let counter = counter_index(rule, reason, audited);
                assert!(counter < crate::abi::MAX_COUNTERS);
                seen.insert(counter);
            }
        }
    }
    // u16::MAX is counted as "no rule", every other one by itself.
    assert_eq!(seen.len(), Reason::ALL.len() * 3 * 2);
}

proptest! {
    /// A flood of strangers finds few marks of a node's pods: they spread.
    #[test]
    fn the_marks_of_a_nodes_pods_spread(network: [u8; 3], long: [u8; 14]) {
        let v4 = |last| mapped([network[0], network[1], network[2], last]);
        let v6 = |last: u8| std::array::from_fn(|at| long.get(at).copied().unwrap_or(if at == 15 { last } else { 0 }));
        for addresses in [&v4 as &dyn Fn(u8) -> [u8; 16], &v6] {
            let mut slots: Vec<u32> = (0..=255).map(|last| opener_slot(&addresses(last))).collect();
            prop_assert!(slots.iter().all(|slot| *slot < OPENER_SLOTS));
            slots.sort_unstable();
            slots.dedup();
            prop_assert!(slots.len() > 128, "{} of 256", slots.len());
        }
    }
}
