//! One ruleset after another under load: at no moment is a stranger admitted or an allowed peer denied.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread::Scope,
    time::{Duration, Instant},
};

use lab::{
    client::timed_out,
    lab::{Lab, POD_PORTS, POLICY},
    net::Who,
    process::until,
};
use nix::sched::{CloneFlags, setns};

/// Plain HTTP of the node, and an echo.
const HTTP: u16 = 10_251;
const ECHO: u16 = 10_253;
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

/// Two rulesets with other names, ports, scopes and peers. Both admit the peer and nobody else to the ports that are tried.
fn rulesets() -> [String; 2] {
    let head = POLICY.split("    - name: kubelet").next().unwrap();
    let tail = "  tunnel: {dial: []}\n";
    let rule = |name: &str, what: &str, allow: &[&str]| {
        format!("    - name: {name}\n      {what}\n      allow: [{}]\n", allow.join(", "))
    };
    let pods = |ports: &str| format!("pods: {{cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [{ports}]}}");
    let one = [
        rule("node-http", "node: {ports: [10250, 10251]}", &["tunnel: {}", PEERS[0], PEERS[1]]),
        rule("echo", "node: {ports: [10253], protocol: UDP}", &PEERS),
        rule("gone-soon", "node: {ports: [7000-7100]}", &[]),
        rule("web", &pods("8080"), &PEERS),
    ];
    // Denials are counted for the first rule of a port: its name, and so its counter, stays.
    let other = [
        rule("node-http", "node: {ports: [10251]}", &FEWER),
        rule("others", "node: {ports: [10240-10260, 7000]}", &OTHERS),
        rule("echo", "node: {ports: [10253-10255], protocol: UDP}", &FEWER),
        rule(
            "web",
            &pods("8000-8099, 9000").replace("10.244.1.0/24", "10.244.0.0/16"),
            &[FEWER[0], FEWER[1], OTHERS[0]],
        ),
    ];
    [one.concat(), other.concat()].map(|rules| format!("{head}{rules}{tail}"))
}

/// What is tried, and what came of it.
struct Tries {
    what: &'static str,
    who: Who,
    attempt: fn(SocketAddr, Duration) -> bool,
    patience: Duration,
    made: AtomicUsize,
    answered: AtomicUsize,
}

impl Tries {
    fn new((what, who, attempt): (&'static str, Who, fn(SocketAddr, Duration) -> bool)) -> Tries {
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
                // The flips need some of the processor too.
                std::thread::sleep(Duration::from_millis(2));
            }
        });
    }
}

/// A whole exchange: the handshake, a request, an answer.
fn tcp(to: SocketAddr, patience: Duration) -> bool {
    let exchange = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        // Closed with a RST: no port waits for the next attempt.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n")?;
        stream.read_exact(&mut [0; 12])
    };
    exchange().is_ok()
}

fn udp(to: SocketAddr, patience: Duration) -> bool {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
    let socket = UdpSocket::bind(any).unwrap();
    socket.set_read_timeout(Some(patience)).unwrap();
    socket.send_to(b"hello", to).unwrap();
    match socket.recv_from(&mut [0; 16]) {
        Ok(_) => true,
        Err(error) => {
            assert!(timed_out(&error), "{error}");
            false
        }
    }
}

#[test]
fn flips_under_load_admit_no_stranger_and_deny_no_peer() {
    let [one, other] = rulesets();
    let mut lab = Lab::bare().unwrap();
    lab.start_in(Who::Node, "", &["pod", &format!("[::]:{HTTP}")]).unwrap();
    lab.start_in(Who::Node, "", &["echo", &format!("[::]:{ECHO}")]).unwrap();
    lab.write_policy(&one).unwrap();
    lab.start_daemon().unwrap();
    let first = lab.daemon().unwrap().status().unwrap();
    let stop = AtomicBool::new(false);
    let tries = [
        ("stranger, TCP", Who::Stranger, tcp as fn(SocketAddr, Duration) -> bool),
        ("stranger, UDP", Who::Stranger, udp),
        ("peer, TCP", Who::Peer, tcp),
        ("peer, UDP", Who::Peer, udp),
    ]
    .map(Tries::new);
    let [stranger_tcp, stranger_udp, peer_tcp, peer_udp] = &tries;
    let started = Instant::now();
    std::thread::scope(|scope| {
        for v6 in [false, true] {
            let (http, web) =
                (SocketAddr::new(Who::Node.address(v6), HTTP), SocketAddr::new(Who::Pod.address(v6), POD_PORTS[0]));
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
            lab.write_policy(if number % 2 == 0 { &other } else { &one })?;
            until("the flip", Duration::from_secs(10), || Ok(active() > before))
        });
        if started.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_secs(3) - started.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        flipped.map_err(|error| format!("{error:#}\n{}", daemon.printed())).unwrap();
    });
    let took = started.elapsed();
    let after = lab.daemon().unwrap().status().unwrap();
    println!("flips: {} under load in {took:.1?}", flips());
    for each in &tries {
        let (made, answered) = each.counts();
        println!("flips: {}: {made} attempts, {answered} answered", each.what);
        assert!(made > flips() / 2, "{}: too few attempts to tell", each.what);
        assert_eq!(answered, if each.what.starts_with("peer") { made } else { 0 }, "{}", each.what);
    }
    assert_eq!(after.policy.epoch - first.policy.epoch, flips() as u32, "one epoch a flip");
    let packets = |reason: &str| -> u64 {
        after.counters.iter().filter(|counter| counter.reason == reason).map(|counter| counter.packets).sum()
    };
    assert_eq!((packets("table-damaged"), after.cut, after.mended), (0, 0, 0), "{:?}", after.counters);
    // Not one packet of a peer is among what was denied.
    let strangers =
        tries.iter().filter(|tries| tries.who == Who::Stranger).map(|tries| tries.counts().0 as u64).sum::<u64>();
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
