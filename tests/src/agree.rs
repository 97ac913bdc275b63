//! Owns the comparison of kernel and host: random rulesets and packets, each decided by both.
//! Called by the tests of the kernel area, and inside the kernels that `nodeguard-guest` runs on.
//! Must never compare verdicts alone: reason, rule, audit, epoch and flow have to agree too.
#![expect(clippy::unwrap_used, reason = "a comparison that cannot be made ends the test")]

use std::{collections::BTreeMap, net::IpAddr, path::Path, sync::Arc, time::Duration};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData},
    programs::{CgroupSkb, SchedClassifier, TestRun, TestRunOptions, Xdp},
};
use guard_common::{
    Decision, Listener, Namespace, Reason, RulesetInForce, Verdict,
    abi::{Asked, AskedKey, FlowKey, Pinhole, Probe, SENT_NANOSECONDS, SentDatagram, UDP_FLOW_SECONDS},
    decide, denied_at_the_edge,
};
use guard_policy::{
    ruleset::{
        ALL_PODS_SCOPE, GuardedPort, Mode, OTHER_PODS_SCOPE, Peer, PeerKind, PodsCgroup, PortRule, RuleSummary,
        Ruleset, RulesetTables, Selectors,
    },
    tables::{
        host::Model,
        pod_scopes::{Namespaces, Observed},
    },
};
use nodeguard::kernel::{
    cgroups::follow::find,
    pinholes::OpenPinholes,
    tables::{apply::Apply, plan, plan::MapOp, ruleset_maps::RulesetMaps},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::packets::{self, Sample, ethernet, pick};

/// Kernel and host under one ruleset.
struct Pair {
    ebpf: Ebpf,
    probe: Array<MapData, Probe>,
    pinholes: OpenPinholes,
    sent: HashMap<MapData, FlowKey, SentDatagram>,
    /// Of the node's sockets and of pods'.
    asked: [HashMap<MapData, AskedKey, Asked>; 2],
    apply: Apply,
    model: Model,
}

/// What one comparison came to.
#[derive(Default, Debug)]
pub struct Tally {
    /// Decisions.
    pub compared: u64,
    /// Frames that the kernel takes none of in a test run.
    pub too_short: u64,
    /// Where kernel and host decided differently.
    pub differences: Vec<String>,
    /// How often each reason was reached.
    pub reasons: BTreeMap<&'static str, u64>,
}

/// Compares so many random packets, and every named one, under each of so many random rulesets.
pub fn compare(object: &[u8], rulesets: usize, packets: usize) -> Tally {
    let mut rng = StdRng::seed_from_u64(0x6e6f_6465);
    let mut tally = Tally::default();
    let mut pair = Pair::new(object);
    for _ in 0..rulesets {
        pair.change(&mut rng);
        let (v4, v6) = (pool_v4(), pool_v6());
        let named = (0..4).flat_map(|_| {
            packets::named(pick(&mut rng, &v4), pick(&mut rng, &v4), pick(&mut rng, &v6), pick(&mut rng, &v6))
        });
        let mut samples: Vec<Sample> = named.collect();
        samples.extend((0..packets).map(|_| packets::random(&mut rng, &v4, &v6)));
        for sample in samples {
            let listener = Listener {
                namespace: pick(&mut rng, &[Namespace::Node, Namespace::Pod, Namespace::Unknown]),
                port: pick(&mut rng, &[10_250, 10_250, 8080, 9090, 0]),
                protocol: if sample.name.ends_with("UDP") { 17 } else { pick(&mut rng, &[6, 6, 6, 6, 17]) },
                netns: rng.random_range(0..6),
                socket: rng.random_range(0..4),
                over_loopback: rng.random_bool(0.3),
            };
            let in_pods = rng.random_bool(0.5);
            for program in ["probe_direct", "probe_helper"] {
                pair.compare_one(program, &sample, listener, in_pods, &mut tally);
            }
            for program in ["probe_edge", "probe_edge_tc"] {
                pair.compare_edge(program, &sample, &mut tally);
            }
        }
    }
    tally
}

impl Pair {
    fn new(object: &[u8]) -> Pair {
        let mut ebpf = load(object);
        for program in ["probe_direct", "probe_helper"] {
            let program: &mut CgroupSkb = ebpf.program_mut(program).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        <&mut Xdp>::try_from(ebpf.program_mut("probe_edge").unwrap()).unwrap().load().unwrap();
        <&mut SchedClassifier>::try_from(ebpf.program_mut("probe_edge_tc").unwrap()).unwrap().load().unwrap();
        Pair {
            probe: Array::try_from(ebpf.take_map("PROBE").unwrap()).unwrap(),
            pinholes: OpenPinholes::take(&mut ebpf).unwrap(),
            sent: HashMap::try_from(ebpf.take_map("SENT").unwrap()).unwrap(),
            asked: ["ASKED", "ASKED_BY_PODS"].map(|name| HashMap::try_from(ebpf.take_map(name).unwrap()).unwrap()),
            apply: Apply::new(RulesetMaps::take(&mut ebpf).unwrap()).unwrap().below(Path::new(HERE)),
            ebpf,
            model: Model::default(),
        }
    }

    /// Brings a random ruleset into force on both sides, by the product's own way, and opens random pinholes.
    fn change(&mut self, rng: &mut StdRng) {
        let ruleset = random_ruleset(rng);
        let addresses = pool_v4().map(IpAddr::from).into_iter().chain(pool_v6().map(IpAddr::from));
        let mut one = || addresses.clone().filter(|_| rng.random_bool(0.15)).collect();
        let namespaces: Namespaces = (1..6).map(|cookie| (cookie, one())).collect();
        self.apply.see(namespaces.clone());
        let observed = Observed { cgroups: find(Path::new(HERE), &ruleset), namespaces };
        for op in &plan::plan(&self.model.image, &ruleset, &observed).unwrap().ops {
            op.apply_to(&mut self.model.image);
        }
        let in_force = self.apply.apply(&Arc::new(ruleset)).unwrap();
        assert_eq!(in_force.epoch, self.model.image.epoch);
        self.damage(rng);
        for key in std::mem::take(&mut self.model.pinholes).keys() {
            self.pinholes.remove(key).unwrap();
        }
        (self.model.sent, self.model.asked) = Default::default();
        empty(&mut self.sent);
        self.asked.iter_mut().for_each(empty);
        let callers: Vec<u64> =
            self.model.image.entries.followed.callers.keys().map(|key| key.cgroup).chain([77]).collect();
        for round in 0..400 {
            let is_v4 = rng.random_bool(0.5);
            let mut address = || {
                if is_v4 { guard_common::packet::mapped(pick(rng, &pool_v4())) } else { pick(rng, &pool_v6()) }
            };
            let (source, destination) = (address(), address());
            let key = FlowKey {
                source,
                destination,
                source_port: pick(rng, &[0u16, 40_000, 10_250, 80]).to_be_bytes(),
                destination_port: pick(rng, &[10_250u16, 8080]).to_be_bytes(),
            };
            let vias = [Pinhole::TUNNEL, Pinhole::NODE, Pinhole::CALLER, Pinhole::CALLER | Pinhole::NODE, 0, 64];
            let (via, cgroup) = (pick(rng, &vias), pick(rng, &callers));
            // One that has run out is there for the kernel, and none for the host.
            let lives = rng.random_bool(0.7);
            match round % 3 {
                0 => {
                    let pinhole = Pinhole { via, cgroup, reserved: 0 };
                    self.pinholes.insert(key, pinhole).unwrap();
                    self.model.pinholes.insert(key, pinhole);
                }
                1 => {
                    let at_ns = now().as_nanos() as u64 - if lives { 0 } else { 2 * SENT_NANOSECONDS };
                    // It lasts as long as the packets of this ruleset take.
                    let at_ns = if lives { at_ns + (1 << 40) } else { at_ns };
                    let sent = SentDatagram { cgroup, netns: rng.random_range(0..6), at_ns, via, reserved: 0 };
                    self.sent.insert(key, sent, 0).unwrap();
                    self.model.sent.remove(&key);
                    if lives {
                        self.model.sent.insert(key, sent);
                    }
                }
                _ => {
                    let FlowKey { source: address, source_port: port, .. } = key;
                    let asked = AskedKey { socket: rng.random_range(0..4), address, port, reserved: [0; 6] };
                    let age = if lives { UDP_FLOW_SECONDS / 2 } else { UDP_FLOW_SECONDS * 2 };
                    let at = (now().as_secs() as u32).wrapping_sub(age);
                    // A socket is of the node or of a pod.
                    self.asked[asked.socket as usize % 2].insert(asked, Asked { at }, 0).unwrap();
                    self.model.asked.remove(&asked);
                    if lives {
                        self.model.asked.insert(asked);
                    }
                }
            }
        }
    }

    /// Now and then somebody else has written to the tables: both sides see the same.
    fn damage(&mut self, rng: &mut StdRng) {
        fn one<K: Copy, V>(rng: &mut StdRng, table: &BTreeMap<K, V>) -> Option<K> {
            let number = rng.random_range(0..table.len().max(1));
            table.keys().nth(number).copied()
        }
        for _ in 0..pick(rng, &[0, 0, 0, 0, 1, 3]) {
            let entries = &self.model.image.entries;
            let op = match rng.random_range(0..6) {
                0 => one(rng, &entries.ports).map(|key| MapOp::Port(key, None)),
                1 => one(rng, &entries.scopes).map(|key| MapOp::Scope(key, None)),
                2 => one(rng, &entries.ports_copy).map(|key| MapOp::PortCopy(key, None)),
                3 => one(rng, &entries.scopes_copy).map(|key| MapOp::ScopeCopy(key, None)),
                4 => Some(MapOp::Activate(rng.random_range(0..50))),
                _ => Some(MapOp::Generation(rng.random_range(0..2), None)),
            };
            if let Some(op) = op {
                self.apply.carry_out(&op).unwrap();
                op.apply_to(&mut self.model.image);
            }
        }
    }

    /// The same for the edge: what it would drop, and what for.
    fn compare_edge(&mut self, name: &str, sample: &Sample, tally: &mut Tally) {
        self.probe.set(0, Probe::default(), 0).unwrap();
        let frame = ethernet([0; 6], [0; 6], &sample.bytes);
        let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::new() };
        let program = self.ebpf.program_mut(name).unwrap();
        // XDP_DROP is 1, TCX_DROP is 2.
        let (result, drops) = match <&mut Xdp>::try_from(&mut *program) {
            Ok(program) => (program.test_run(options), 1),
            Err(_) => (<&mut SchedClassifier>::try_from(program).unwrap().test_run(options), 2),
        };
        let Ok(result) = result else {
            assert!(sample.bytes.len() < 40, "the kernel refused {}: {:?}", sample.name, sample.bytes);
            tally.too_short += 1;
            return;
        };
        let answer = self.probe.get(&0, 0).unwrap();
        let kernel = (result.return_value == drops).then(|| {
            let reason = Reason::from_index(answer.reason).unwrap();
            (reason, answer.rule, answer.epoch, answer.flow)
        });
        let denied = denied_at_the_edge(sample.bytes.as_slice(), &self.model);
        let host = denied.map(|Decision { reason, rule, epoch, flow, .. }| (reason, rule, epoch, flow));
        tally.compared += 1;
        if let Some((reason, ..)) = host {
            *tally.reasons.entry(reason.name()).or_default() += 1;
        }
        if kernel != host {
            let Sample { name: what, bytes } = sample;
            tally.differences.push(format!("{name}, {what} {bytes:02x?}: kernel {kernel:?}, host {host:?}"));
        }
    }

    fn compare_one(&mut self, program: &str, sample: &Sample, listener: Listener, in_pods: bool, tally: &mut Tally) {
        let scope = match listener.namespace {
            Namespace::Node => 0,
            Namespace::Pod => 1,
            Namespace::Unknown => 2,
        };
        let question = Probe {
            scope,
            port: listener.port,
            protocol: listener.protocol,
            in_pods: in_pods.into(),
            over_loopback: listener.over_loopback.into(),
            netns: listener.netns as u8,
            socket: listener.socket as u8,
            ..Probe::default()
        };
        self.probe.set(0, question, 0).unwrap();
        // A test run takes an Ethernet frame; a cgroup's program begins behind its header.
        let frame = ethernet([0; 6], [0; 6], &sample.bytes);
        let prepared: &mut CgroupSkb = self.ebpf.program_mut(program).unwrap().try_into().unwrap();
        let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::new() };
        let Ok(result) = prepared.test_run(options) else {
            // The kernel refuses frames that end inside the IP header; the host judges them in its own tests.
            assert!(sample.bytes.len() < 40, "the kernel refused {}: {:?}", sample.name, sample.bytes);
            tally.too_short += 1;
            return;
        };
        let answer = self.probe.get(&0, 0).unwrap();
        let kernel = Decision {
            verdict: if result.return_value == 1 { Verdict::Allow } else { Verdict::Deny },
            reason: Reason::from_index(answer.reason).unwrap(),
            rule: answer.rule,
            audited: answer.audited != 0,
            epoch: answer.epoch,
            flow: answer.flow,
        };
        let host =
            decide(sample.bytes.as_slice(), listener, || in_pods, &RulesetInForce::read(&self.model), &self.model);
        tally.compared += 1;
        *tally.reasons.entry(host.reason.name()).or_default() += 1;
        if kernel != host {
            let Sample { name, bytes } = sample;
            tally
                .differences
                .push(format!("{program}, {name} {bytes:02x?} for {listener:?}: kernel {kernel:?}, host {host:?}"));
        }
    }
}

fn empty<K: aya::Pod, V: aya::Pod>(table: &mut HashMap<MapData, K, V>) {
    let keys: Vec<K> = table.keys().map(Result::unwrap).collect();
    keys.iter().for_each(|key| table.remove(key).unwrap());
}

/// Loads an object that was built for tests.
pub fn load(object: &[u8]) -> Ebpf {
    EbpfLoader::new().override_global("NETNS_HELPER", &1u32, true).load(object).unwrap()
}

/// Any directories do for cgroups here: an id is an inode.
const HERE: &str = "/";
const CALLERS: [&str; 3] = ["/proc", "/sys", "/not-there"];

/// `CLOCK_MONOTONIC`, as the programs read it.
fn now() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap().into()
}

fn pool_v4() -> [[u8; 4]; 7] {
    [[10, 0, 0, 1], [10, 0, 8, 5], [10, 0, 8, 66], [10, 244, 1, 7], [10, 244, 2, 9], [127, 0, 0, 1], [192, 0, 2, 1]]
}

fn pool_v6() -> [[u8; 16]; 6] {
    ["fd00::1", "fd00:8::5", "fd00:8::66", "fd00:244:1::7", "::1", "2001:db8::1"]
        .map(|text| text.parse::<std::net::Ipv6Addr>().unwrap().octets())
}

fn random_ruleset(rng: &mut StdRng) -> Ruleset {
    let count = rng.random_range(1..5);
    let rules = (0..count)
        .map(|_| RuleSummary {
            name: format!("rule-{}", rng.random_range(0..1000)),
            mode: Mode::Enforce,
            guards: String::new(),
            allows: String::new(),
        })
        .collect();
    let networks: Vec<ipnet::IpNet> = [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.0.8.0/24",
        "10.0.8.66/32",
        "10.244.1.0/24",
        "10.0.0.1/32",
        "127.0.0.0/8",
        "::/0",
        "fd00::/16",
        "fd00:8::/64",
        "fd00:8::66/128",
        "fd00:244:1::/48",
        "::1/128",
    ]
    .iter()
    .map(|text| text.parse().unwrap())
    .collect();
    let mut tables = RulesetTables { pods_cgroup: Some(PodsCgroup::Usual), ..RulesetTables::default() };
    for net in &networks {
        if rng.random_bool(0.4) {
            tables.scopes.insert(*net, rng.random_range(0..3));
        }
        for list in 0..3 {
            if rng.random_bool(0.35) {
                let kind = if rng.random_bool(0.6) { PeerKind::Allow } else { PeerKind::Except };
                tables.peers.insert((list, *net), Peer { rule: rng.random_range(0..count), kind });
            }
        }
    }
    for path in CALLERS {
        tables.cgroups.insert(path.to_owned(), 1);
        for list in 0..4 {
            if rng.random_bool(0.5) {
                tables.callers.insert((list, path.to_owned()), rng.random_range(0..count));
            }
        }
    }
    for scope in [0, 1, 2, ALL_PODS_SCOPE, OTHER_PODS_SCOPE] {
        for (protocol, port) in [(6, 10_250), (6, 8080), (17, 10_250), (6, 0)] {
            if rng.random_bool(0.7) {
                let some_rule = |rng: &mut StdRng| rng.random_bool(0.5).then(|| rng.random_range(0..count));
                let rule = PortRule {
                    list: rng.random_range(0..4),
                    rule: rng.random_range(0..count),
                    tunnel: some_rule(rng),
                    node: some_rule(rng),
                    caller: false,
                    audit: rng.random_bool(0.3),
                    opens: Selectors::default(),
                };
                tables.ports.insert(GuardedPort { scope, protocol, port }, rule);
            }
        }
    }
    Ruleset {
        name: "random".into(),
        digest: String::new(),
        mode: Mode::Enforce,
        rules,
        tables,
        dial: Vec::new(),
        services: Default::default(),
    }
}
