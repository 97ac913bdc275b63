//! One ruleset after another under load: at no moment is a stranger admitted or an allowed peer denied.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread::Scope,
    time::{Duration, Instant},
};

use lab::{
    helper::{Attempt, PAUSE, tcp, udp},
    lab::{Lab, POLICY},
    net::Who,
    process::until,
};
use nix::sched::{CloneFlags, setns};

/// Plain HTTP of the node, an echo, and plain HTTP of a pod.
const HTTP: u16 = 10_251;
const ECHO: u16 = 10_253;
const WEB: u16 = 8090;
/// The cgroup of the pod, a local process that every ruleset admits, and one that none does.
const POD: &str = "kubepods.slice/pod1/container";
const AGENT: &str = "system/agent.service";
const OTHER: &str = "system/other.service";
const CALLER: &str = "caller: {cgroup: /system/agent.service}";
const PEERS: [&str; 2] = [
    "ipBlock: {cidr: 10.0.8.0/24, except: [10.0.8.66/32]}",
    "ipBlock: {cidr: 'fd00:8::/32', except: ['fd00:8::66/128']}",
];
const FEWER: [&str; 2] = ["ipBlock: {cidr: 10.0.8.5/32}", "ipBlock: {cidr: 'fd00:8::5/128'}"];
/// Somebody else's.
const OTHERS: [&str; 2] = ["ipBlock: {cidr: 10.0.9.0/24}", "ipBlock: {cidr: 'fd00:9::/32'}"];

fn flips() -> usize {
    if std::env::var_os("NODEGUARD_SOAK").is_some() { 1000 } else { 60 }
}

/// Rulesets with other names, ports, scopes, peers and callers. All admit the peer and the agent, and nobody else, to the ports that are
/// tried. The pod is guarded by two prefixes of different length and by its cgroup.
fn rulesets() -> [String; 3] {
    let head = POLICY.split("    - name: kubelet").next().unwrap();
    let tail = "  tunnel: {dial: []}\n";
    let rule = |name: &str, what: &str, allow: &[&str]| {
        format!("    - name: {name}\n      {what}\n      allow: [{}]\n", allow.join(", "))
    };
    let pods = |ports: &str| format!("pods: {{cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [{ports}]}}");
    let one = [
        rule("node-http", "node: {ports: [10250, 10251]}", &["tunnel: {}", CALLER, PEERS[0], PEERS[1]]),
        rule("echo", "node: {ports: [10253], protocol: UDP}", &[PEERS[0], PEERS[1], CALLER]),
        rule("gone-soon", "node: {ports: [7000-7100]}", &[]),
        rule("web", &pods("8090"), &PEERS),
    ];
    // Denials are counted for the first rule of a port: its name, and so its counter, stays.
    let other = [
        rule("node-http", "node: {ports: [10251]}", &[FEWER[0], FEWER[1], CALLER]),
        rule("others", "node: {ports: [10240-10260, 7000]}", &OTHERS),
        rule("echo", "node: {ports: [10253-10255], protocol: UDP}", &[FEWER[0], CALLER, FEWER[1]]),
        rule(
            "web",
            &pods("8000-8099, 9000").replace("10.244.1.0/24", "10.244.0.0/16"),
            &[FEWER[0], FEWER[1], OTHERS[0]],
        ),
    ];
    let every_pod = [
        rule("node-http", "node: {ports: [10251-10252]}", &[CALLER, PEERS[0], FEWER[1]]),
        rule("echo", "node: {ports: [10253], protocol: UDP}", &[CALLER, FEWER[0], PEERS[1]]),
        rule("web", "pods: {ports: [8090]}", &[PEERS[0], PEERS[1], "caller: {cgroup: /system/third.service}"]),
    ];
    [one.concat(), other.concat(), every_pod.concat()].map(|rules| format!("{head}{rules}{tail}"))
}

/// What is tried, and what came of it.
struct Tries {
    what: &'static str,
    who: Who,
    attempt: Attempt,
    patience: Duration,
    made: AtomicUsize,
    answered: AtomicUsize,
}

impl Tries {
    fn new((what, who, attempt): (&'static str, Who, Attempt)) -> Tries {
        // A SYN that is dropped is sent again after a second: patience ends before, and one attempt is one packet. A datagram is sent once.
        let patience = Duration::from_millis(match (who, what.ends_with("UDP")) {
            (Who::Peer, true) => 5000,
            (Who::Peer, false) => 900,
            _ => 100,
        });
        Tries { what, who, attempt, patience, made: AtomicUsize::new(0), answered: AtomicUsize::new(0) }
    }

    fn counts(&self) -> (usize, usize) {
        (self.made.load(Ordering::Relaxed), self.answered.load(Ordering::Relaxed))
    }

    /// Tries on a thread of its own, one attempt after the other.
    fn keep_on<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        lab: &Lab,
        to: SocketAddr,
        stop: &'scope AtomicBool,
    ) {
        let namespace = lab.net.open(self.who).unwrap();
        scope.spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            while !stop.load(Ordering::Relaxed) {
                self.made.fetch_add(1, Ordering::Relaxed);
                self.answered.fetch_add(usize::from((self.attempt)(to, self.patience)), Ordering::Relaxed);
                std::thread::sleep(PAUSE);
            }
        });
    }
}

/// Local processes that try, in a cgroup of their own.
struct LocalTries {
    what: &'static str,
    admitted: bool,
    logs: Vec<PathBuf>,
}

impl LocalTries {
    /// Starts them; they end when the file `stop` exists.
    fn start(lab: &mut Lab, (what, cgroup, how): (&'static str, &str, &str)) -> LocalTries {
        let admitted = cgroup == AGENT;
        let patience = match (admitted, how) {
            (true, "udp") => "5000",
            (true, _) => "900",
            _ => "100",
        };
        let port = if how == "udp" { ECHO } else { HTTP };
        let addresses = [SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::new(Who::Node.address(true), port)];
        let stop = stop_file(lab);
        // A denied attempt lasts as long as its patience: more processes make as many attempts as there are of the others.
        let count = if admitted { 1 } else { 4 };
        let logs = addresses.into_iter().cycle().take(count * addresses.len()).map(|to| {
            lab.start_in(Who::Node, cgroup, &["tries", how, &to.to_string(), patience, stop.to_str().unwrap()]).unwrap()
        });
        let logs = logs.collect();
        LocalTries { what, admitted, logs }
    }

    /// How many attempts were made, and how many of them were answered.
    fn counts(&self) -> (usize, usize) {
        let counts = self.logs.iter().map(|log| {
            let mut counts = None;
            until("a helper stops", Duration::from_secs(10), || {
                let said = std::fs::read_to_string(log)?;
                counts = said.lines().last().and_then(|line| serde_json::from_str::<(usize, usize)>(line).ok());
                Ok(counts.is_some())
            })
            .unwrap();
            counts.unwrap()
        });
        counts.fold((0, 0), |(made, answered), (more, of_them)| (made + more, answered + of_them))
    }
}

fn stop_file(lab: &Lab) -> PathBuf {
    lab.directory.join("stop")
}

#[test]
fn flips_under_load_admit_no_stranger_and_deny_no_peer() {
    let rulesets = rulesets();
    let mut lab = Lab::bare().unwrap();
    for cgroup in [POD, AGENT, OTHER] {
        lab.make_cgroup(cgroup).unwrap();
    }
    lab.start_in(Who::Pod, POD, &["pod", &format!("[::]:{WEB}")]).unwrap();
    lab.start_in(Who::Node, "", &["pod", &format!("[::]:{HTTP}")]).unwrap();
    lab.start_in(Who::Node, "", &["echo", &format!("[::]:{ECHO}")]).unwrap();
    lab.write_policy(&rulesets[0]).unwrap();
    lab.start_daemon().unwrap();
    let first = lab.daemon().unwrap().status().unwrap();
    let stop = AtomicBool::new(false);
    let tries = [
        ("stranger, TCP", Who::Stranger, tcp as Attempt),
        ("stranger, UDP", Who::Stranger, udp),
        ("peer, TCP", Who::Peer, tcp),
        ("peer, UDP", Who::Peer, udp),
    ]
    .map(Tries::new);
    let [stranger_tcp, stranger_udp, peer_tcp, peer_udp] = &tries;
    let local = [
        ("caller, TCP", AGENT, "tcp"),
        ("caller, UDP", AGENT, "udp"),
        ("other local process, TCP", OTHER, "tcp"),
        ("other local process, UDP", OTHER, "udp"),
    ]
    .map(|which| LocalTries::start(&mut lab, which));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for v6 in [false, true] {
            let (http, web) =
                (SocketAddr::new(Who::Node.address(v6), HTTP), SocketAddr::new(Who::Pod.address(v6), WEB));
            let echo = SocketAddr::new(Who::Node.address(v6), ECHO);
            for to in [http, web] {
                (0..12).for_each(|_| stranger_tcp.keep_on(scope, &lab, to, &stop));
                peer_tcp.keep_on(scope, &lab, to, &stop);
            }
            (0..4).for_each(|_| stranger_udp.keep_on(scope, &lab, echo, &stop));
            peer_udp.keep_on(scope, &lab, echo, &stop);
        }
        let daemon = lab.daemon.as_ref().unwrap();
        let active = epoch_reader(&lab);
        let flipped = (0..flips()).try_for_each(|number| {
            let before = active();
            lab.write_policy(&rulesets[(number + 1) % rulesets.len()])?;
            until("the flip", Duration::from_secs(10), || Ok(active() > before))
        });
        if started.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_secs(3) - started.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        std::fs::write(stop_file(&lab), "").unwrap();
        flipped.map_err(|error| format!("{error:#}\n{}", daemon.printed())).unwrap();
    });
    let took = started.elapsed();
    let counts = tries.iter().map(|each| (each.what, each.who == Who::Peer, each.counts()));
    let counts: Vec<_> = counts.chain(local.iter().map(|each| (each.what, each.admitted, each.counts()))).collect();
    let after = lab.daemon().unwrap().status().unwrap();
    println!("flips: {} under load in {took:.1?}", flips());
    for (what, admitted, (made, answered)) in &counts {
        println!("flips: {what}: {made} attempts, {answered} answered");
        assert!(*made > flips() / 2, "{what}: too few attempts to tell");
        assert_eq!(*answered, if *admitted { *made } else { 0 }, "{what}");
    }
    assert_eq!(after.policy.epoch - first.policy.epoch, flips() as u32, "one epoch a flip");
    let packets = |reason: &str| -> u64 {
        after.counters.iter().filter(|counter| counter.reason == reason).map(|counter| counter.packets).sum()
    };
    assert_eq!((packets("table-damaged"), after.cut, after.mended), (0, 0, 0), "{:?}", after.counters);
    // Not one packet of a peer or of the caller is among what was denied.
    let strangers = counts.iter().filter(|(_, admitted, _)| !admitted).map(|(.., (made, _))| *made as u64).sum::<u64>();
    let denied = ["no-selector", "except", "bad-header", "pinhole-not-allowed"].map(packets).iter().sum::<u64>();
    println!("flips: {denied} packets denied");
    assert_eq!(denied, strangers, "{:?}", after.counters);
}

/// Reads the epoch in force straight from the kernel.
fn epoch_reader(lab: &Lab) -> impl Fn() -> u32 + use<> {
    use aya::maps::{Array, Map, MapData};
    let pins = lab.pins();
    let map = MapData::from_pin(pins.join("maps/ACTIVE")).unwrap();
    let active: Array<MapData, guard_common::abi::Active> = Map::from_map_data(map).unwrap().try_into().unwrap();
    move || active.get(&0, 0).unwrap().epoch
}
