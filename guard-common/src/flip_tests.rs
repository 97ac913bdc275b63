//! Owns the proof that every hook meets one ruleset: another one becomes active before any single look-up of a walk.
//! Called by the test runner.
//! Must never change anything but the active slot: the entries of both generations are complete during a switch, because the old ones are
//! removed only after a grace period (membarrier) in which every running program has ended.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};

use crate::{
    Ancestors, Conversations, Decision, Destination, Listener, Namespace, PacketSocket, Reached, Reason,
    RulesetInForce, Verdict,
    abi::{Address, AskedKey, FlowKey, Generation, PeerValue, Pinhole, PortValue, ScopeValue, SentDatagram},
    decide, denied_at_the_edge,
    flip_world::{Rules, Situation, World},
    in_pods, judge_connection, judge_packet, local_caller, opened_pinhole,
    packet::{TCP, UDP, mapped},
    reach, sent_datagram,
};

/// What a sent datagram leaves behind.
#[derive(Clone, Debug, PartialEq)]
enum Entry {
    Asked(AskedKey),
    Sent(FlowKey, SentDatagram),
    TakenOver(FlowKey),
}

/// The entries that a walk makes, in their order.
#[derive(Default)]
struct Entries(RefCell<Vec<Entry>>);

impl Conversations for Entries {
    fn asks(&self, _: Namespace, key: &AskedKey) {
        self.0.borrow_mut().push(Entry::Asked(*key));
    }
    fn sends(&self, flow: &FlowKey, datagram: SentDatagram) {
        self.0.borrow_mut().push(Entry::Sent(*flow, datagram));
    }
    fn takes_over(&self, flow: &FlowKey, _: u64) {
        self.0.borrow_mut().push(Entry::TakenOver(*flow));
    }
}

/// What a walk comes to.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Packet(Decision),
    Edge(Option<Decision>),
    Connection(Reached),
    Sent(Vec<Entry>),
    Opened(Option<Pinhole>),
}

type Walk = fn(&World) -> Outcome;

/// The walk of each hook, as guard-ebpf calls it.
const WALKS: [Walk; 5] = [ingress, edge, connect, egress, sockops];

fn ingress(world: &World) -> Outcome {
    let Situation { port, protocol, packet, .. } = world.situation;
    Outcome::Packet(judge_packet(world, *port, *protocol, packet.as_slice(), world))
}

fn edge(world: &World) -> Outcome {
    Outcome::Edge(denied_at_the_edge(world.situation.packet.as_slice(), world))
}

fn destination(world: &World) -> Destination {
    let Situation { to, port, protocol, .. } = *world.situation;
    Destination { address: to, port, protocol }
}

fn connect(world: &World) -> Outcome {
    Outcome::Connection(judge_connection(world, destination(world), world))
}

fn egress(world: &World) -> Outcome {
    let entries = Entries::default();
    sent_datagram(world, world.situation.packet.as_slice(), world, &entries);
    Outcome::Sent(entries.0.into_inner())
}

fn sockops(world: &World) -> Outcome {
    let Situation { to, port, namespace, noted, .. } = *world.situation;
    let flow = FlowKey { destination: to, destination_port: port.to_be_bytes(), ..FlowKey::default() };
    let note = || {
        world.look();
        noted
    };
    Outcome::Opened(opened_pinhole(&flow, note, || namespace == Namespace::Node, world))
}

/// The planted mutants: each step reads the ruleset in force again.
fn ingress_reads_again(world: &World) -> Outcome {
    let Situation { port, protocol, packet, .. } = world.situation;
    let (namespace, netns) = world.namespace();
    let in_pods = in_pods(&RulesetInForce::read(world), |level| world.cgroup_at(level));
    let listener = Listener { namespace, netns, ..Listener::of_node(*port, *protocol) };
    Outcome::Packet(decide(packet.as_slice(), listener, || in_pods, &RulesetInForce::read(world), world))
}

fn connect_reads_again(world: &World) -> Outcome {
    let caller = local_caller(world, &RulesetInForce::read(world), world);
    Outcome::Connection(reach(caller, destination(world), &RulesetInForce::read(world), world))
}

/// An outcome that neither ruleset gives, with the number of look-ups before the switch; every number is tried.
fn mix(walk: Walk, epoch: u32, rules: [&Rules; 2], situation: &Situation) -> Option<(usize, Outcome)> {
    let at = |flip_after| World { rules, epoch, situation, flip_after, done: Cell::new(0), reads: Cell::new(0) };
    let (new, old) = (walk(&at(0)), walk(&at(usize::MAX)));
    for flip_after in 1.. {
        let world = at(flip_after);
        let outcome = walk(&world);
        if outcome != old && outcome != new {
            return Some((flip_after, outcome));
        }
        if world.done.get() <= flip_after {
            break;
        }
    }
    None
}

const PORTS: [u16; 2] = [10_250, 8090];
const CGROUPS: [u64; 3] = [7, 8, 9];

/// The peer, an address of the node, and two of pods.
fn addresses() -> [Address; 4] {
    [mapped([10, 0, 8, 5]), mapped([10, 0, 0, 2]), mapped([10, 244, 1, 7]), mapped([10, 244, 2, 9])]
}

fn address() -> impl Strategy<Value = Address> {
    prop::sample::select(addresses().to_vec())
}

prop_compose! {
    fn rules()(
        features in 0u32..32,
        pods_cgroup in prop::sample::select(vec![0u64, 7, 9]),
        scopes in prop::collection::btree_map(address(), 0u32..3, 0..4),
        ports in prop::collection::btree_map(
            (
                prop::sample::select(vec![0, 1, 2, ScopeValue::ALL_PODS, ScopeValue::OTHER_PODS, ScopeValue::OTHER_PODS, ScopeValue::DESTINATIONS, ScopeValue::DESTINATIONS | 1]),
                prop::sample::select(PORTS.to_vec()),
                prop::sample::select(vec![TCP, UDP]),
            ),
            (0u32..3, 0u16..256, 0u16..3).prop_map(|(list, flags, rule)| PortValue { list, flags, rule, ..PortValue::default() }),
            0..20,
        ),
        peers in prop::collection::btree_map(
            (0u32..3, address()),
            (0u16..3, 1u16..3).prop_map(|(rule, kind)| PeerValue { rule, kind }),
            0..6,
        ),
        callers in prop::collection::btree_map((0u32..3, prop::sample::select(CGROUPS.to_vec())), 0u32..3, 0..6),
        cgroups in prop::collection::btree_map(prop::sample::select(CGROUPS.to_vec()), 1u32..4, 0..4),
        destinations in prop::collection::btree_map((0u32..2, address()), 0u32..2, 0..6),
        namespace in prop::option::of(prop::sample::select(vec![1, 2, ScopeValue::ALL_PODS])),
    ) -> Rules {
        Rules { features, pods_cgroup, scopes, ports, peers, callers, cgroups, destinations, namespace }
    }
}

fn pinhole() -> impl Strategy<Value = Option<Pinhole>> {
    let some = (0u32..32, prop::sample::select(CGROUPS.to_vec()));
    prop::option::of(some.prop_map(|(via, cgroup)| Pinhole { via, reserved: 0, cgroup }))
}

fn sent() -> impl Strategy<Value = Option<SentDatagram>> {
    let some = (1u32..8, 8u64..10, prop::sample::select(CGROUPS.to_vec()));
    prop::option::of(some.prop_map(|(via, netns, cgroup)| SentDatagram {
        via,
        netns,
        cgroup,
        ..SentDatagram::default()
    }))
}

prop_compose! {
    fn situation()(
        namespace in prop::sample::select(vec![Namespace::Node, Namespace::Pod, Namespace::Unknown]),
        port in prop::sample::select(PORTS.to_vec()),
        protocol in prop::sample::select(vec![TCP, TCP, UDP]),
        around in prop::collection::vec(prop::sample::select(vec![5, 7, 8, 9]), 0..4),
        (pinhole, noted, sent) in (pinhole(), pinhole(), sent()),
        (has_asked, over_loopback) in (prop::bool::weighted(0.2), prop::bool::weighted(0.3)),
        (from, to) in (address(), address()),
        unreadable in prop::bool::weighted(0.05),
    ) -> Situation {
        let mut packet = packet(from, to, port, protocol);
        if unreadable {
            packet.truncate(19);
        }
        Situation { packet, namespace, port, protocol, around, pinhole, sent, has_asked, over_loopback, noted, to }
    }
}

/// The first packet of a TCP connection, or a datagram.
fn packet(from: Address, to: Address, port: u16, protocol: u8) -> Vec<u8> {
    let mut bytes = vec![0u8; 40];
    (bytes[0], bytes[9]) = (0x45, protocol);
    bytes[12..16].copy_from_slice(&from[12..]);
    bytes[16..20].copy_from_slice(&to[12..]);
    bytes[20..22].copy_from_slice(&PORTS[0].to_be_bytes());
    bytes[22..24].copy_from_slice(&port.to_be_bytes());
    bytes[33] = 0x02;
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]
    #[test]
    fn a_flip_between_any_two_look_ups_makes_no_mix(old in rules(), new in rules(), situation in situation(), epoch in 2u32..4) {
        for walk in WALKS {
            prop_assert_eq!(mix(walk, epoch, [&old, &new], &situation), None);
        }
    }

    #[test]
    fn every_hook_reads_the_ruleset_in_force_at_most_once(old in rules(), new in rules(), situation in situation(), flip_after in 0usize..12) {
        for walk in WALKS {
            let world = World { rules: [&old, &new], epoch: 2, situation: &situation, flip_after, done: Cell::new(0), reads: Cell::new(0) };
            walk(&world);
            prop_assert!(world.reads.get() <= 1);
        }
    }
}

/// The property above finds each planted second read among far fewer cases than it tries.
#[test]
fn a_second_read_is_caught() {
    for (name, mutant) in [("ingress", ingress_reads_again as Walk), ("connect", connect_reads_again)] {
        let mut runner = TestRunner::deterministic();
        let caught = (0..Config::default().cases).filter(|_| {
            let [old, new] = [(); 2].map(|()| rules().new_tree(&mut runner).unwrap().current());
            let situation = situation().new_tree(&mut runner).unwrap().current();
            mix(mutant, 2, [&old, &new], &situation).is_some()
        });
        let caught = caught.count();
        assert!(caught > 0, "{name}");
    }
}

/// Two rulesets that both deny a stranger at a pod's port: one guards the port in every pod, the other at the pod's address. A mix of
/// the two admits the stranger, and a walk that reads twice meets that mix.
#[test]
fn two_rulesets_that_both_deny_a_stranger_deny_it_at_every_point_of_the_switch() {
    let [stranger, _, pod, _] = addresses();
    let guarded = |scope| BTreeMap::from([((scope, 8090, TCP), PortValue::default())]);
    let every_pod = Rules {
        features: Generation::PODS,
        pods_cgroup: 7,
        ports: guarded(ScopeValue::OTHER_PODS),
        ..Rules::default()
    };
    let by_address = Rules { features: 0, scopes: [(pod, 1)].into(), ports: guarded(1), ..Rules::default() };
    let situation = Situation {
        packet: packet(stranger, pod, 8090, TCP),
        namespace: Namespace::Pod,
        port: 8090,
        protocol: TCP,
        around: vec![7],
        pinhole: None,
        sent: None,
        has_asked: false,
        over_loopback: false,
        noted: None,
        to: pod,
    };
    for rules in [[&every_pod, &by_address], [&by_address, &every_pod]] {
        for flip_after in 0..12 {
            let world =
                World { rules, epoch: 2, situation: &situation, flip_after, done: Cell::new(0), reads: Cell::new(0) };
            let Outcome::Packet(decision) = ingress(&world) else { panic!("not a packet") };
            assert_eq!((decision.verdict, decision.reason), (Verdict::Deny, Reason::NoSelector));
        }
    }
    let (_, mixed) = mix(ingress_reads_again, 2, [&by_address, &every_pod], &situation).unwrap();
    let Outcome::Packet(decision) = mixed else { panic!("not a packet") };
    assert_eq!((decision.verdict, decision.reason), (Verdict::Allow, Reason::NotGuarded));
}
