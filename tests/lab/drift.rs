//! What somebody removes or changes while the guard runs is told and mended within ten seconds; meanwhile what was taken out opens nothing.

use std::{
    fs,
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, lpm_trie::Key};
use guard_common::abi::{
    Active, Generation, PeerKey4, PeerValue, PortKey, PortValue, ScopeKey, ScopeValue, list_bytes,
};
use lab::{
    client::{Outcome, http, tcp},
    daemon::packets,
    helper::Answer,
    lab::Lab,
    net::Who,
    packets::{Flow, heard, ip, syn, udp},
    process::until,
};
use nodeguard::kernel::links::object::{JUDGES, PROGRAMS};

use crate::shapes::{ECHO, HTTP, WEB, lab, silent, wire};

const WITHIN: Duration = Duration::from_secs(10);
const ATTEMPTS: usize = 1000;

/// Whether what is done can let a stranger in before it is noticed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opens {
    Nothing,
    /// Nobody but who may write maps or detach links can do it, and the guard can only be quick.
    UntilNoticed,
}

/// Knocks at a port from a stranger's address and ever other ports until told to stop, so many times at least; now and then with a datagram at
/// the echo server. How many were sent, and how many were answered.
fn knock(lab: &Lab, to: SocketAddr, first_port: u16, least: usize, stop: &AtomicBool) -> (usize, usize) {
    let wire = wire(lab, Who::Stranger);
    let echo = Who::Node.at(false, ECHO);
    let (mut sent, mut answered) = (0, 0);
    let flow = |port: u16, to| Flow { from: SocketAddr::new(silent(Who::Stranger, false), port), to };
    let mut listen = |patience: Duration| {
        while let Some(packet) = wire.receive(patience).unwrap() {
            // A SYN-ACK to an earlier knock comes again and again.
            let port = packet.get(22..24).map_or(0, |port| u16::from_be_bytes([port[0], port[1]])).max(first_port);
            let heard = heard(flow(port, to), &packet).or_else(|| heard(flow(port, echo), &packet));
            answered += usize::from(heard.is_some());
        }
    };
    while !stop.load(Ordering::Relaxed) || sent < least {
        let port = first_port + (sent % 20_000) as u16;
        if sent % 10 == 9 {
            let flow = flow(port, echo);
            wire.send(&ip(flow, 17, &udp(flow, b"hello"))).unwrap();
        } else {
            let flow = flow(port, to);
            wire.send(&ip(flow, 6, &syn(flow, 1))).unwrap();
        }
        sent += 1;
        if sent % 20 == 0 {
            listen(Duration::from_millis(2));
        }
    }
    listen(Duration::from_millis(100));
    (sent, answered)
}

#[test]
fn links_pins_and_tables_that_somebody_takes_away_come_back() {
    is_mended(lab());
}

/// Whatever the guard of the lab may do.
pub(crate) fn is_mended(mut lab: Lab) {
    let pins = lab.pins();
    let map = |name: &str| Map::from_map_data(MapData::from_pin(pins.join("maps").join(name)).unwrap()).unwrap();
    let active = || -> Array<MapData, Active> { map("ACTIVE").try_into().unwrap() };
    let epoch = || active().get(&0, 0).unwrap().epoch;
    let set_epoch = |epoch: u32| active().set(0, Active { epoch }, 0).unwrap();
    let take_ports = |name: &str, taken: &dyn Fn(&PortKey) -> bool| {
        let mut ports: HashMap<MapData, PortKey, PortValue> = map(name).try_into().unwrap();
        let keys: Vec<PortKey> = ports.keys().flatten().filter(taken).collect();
        assert!(!keys.is_empty());
        keys.iter().for_each(|key| ports.remove(key).unwrap());
    };
    let take_scopes = |name: &str| {
        let mut scopes: LpmTrie<MapData, ScopeKey, ScopeValue> = map(name).try_into().unwrap();
        let keys: Vec<Key<ScopeKey>> = scopes.keys().flatten().collect();
        assert!(!keys.is_empty());
        keys.iter().for_each(|key| scopes.remove(key).unwrap());
    };
    let remove_all = |kind: &str| {
        fs::read_dir(pins.join(kind)).unwrap().flatten().for_each(|entry| fs::remove_file(entry.path()).unwrap());
    };

    let maps = lab.daemon().unwrap().status().unwrap().maps;
    let (node, pod) = (Who::Node.at(false, HTTP), Who::Pod.at(false, WEB));
    use Opens::{Nothing, UntilNoticed};
    let deeds: [(&str, SocketAddr, Opens, &dyn Fn()); 17] = [
        ("the pin of a link is removed", node, Nothing, &|| fs::remove_file(pins.join("links/guard_ingress")).unwrap()),
        ("the pin of a map is removed", node, Nothing, &|| fs::remove_file(pins.join("maps/PEERS_V4")).unwrap()),
        ("a guarded port is taken out", node, Nothing, &|| take_ports("PORTS", &|key| key.port == HTTP)),
        ("every guarded port is taken out", pod, Nothing, &|| take_ports("PORTS", &|_| true)),
        ("the ports' copy is taken out", node, Nothing, &|| take_ports("PORTS_COPY", &|_| true)),
        ("the pods' prefixes are taken out", pod, Nothing, &|| take_scopes("SCOPES")),
        ("the prefixes' copy is taken out", pod, Nothing, &|| take_scopes("SCOPES_COPY")),
        ("the peers are taken out", node, Nothing, &|| {
            let mut peers: LpmTrie<MapData, PeerKey4, PeerValue> = map("PEERS_V4").try_into().unwrap();
            let keys: Vec<Key<PeerKey4>> = peers.keys().flatten().collect();
            keys.iter().for_each(|key| peers.remove(key).unwrap());
        }),
        ("the epoch is set to the other generation's", node, Nothing, &|| set_epoch(epoch() + 7)),
        ("the epoch is set to a later one of the same generation", pod, Nothing, &|| set_epoch(epoch() + 8)),
        ("the epoch is set to none", pod, Nothing, &|| set_epoch(0)),
        ("both generations are wiped", pod, Nothing, &|| {
            let mut generations: Array<MapData, Generation> = map("GENERATIONS").try_into().unwrap();
            (0..2).for_each(|number| generations.set(number, Generation::default(), 0).unwrap());
        }),
        ("everything pinned is removed", node, Nothing, &|| {
            ["links", "programs", "maps"].into_iter().for_each(remove_all)
        }),
        ("the link that judges is detached", node, Nothing, &|| detach(&pins.join("links/guard_ingress"))),
        ("the other link that judges is detached", pod, Nothing, &|| detach(&pins.join("links/guard_ingress_too"))),
        // From here on a SYN-ACK of one deed may come again during the next.
        ("a stranger is written among the peers", node, UntilNoticed, &|| {
            let mut peers: LpmTrie<MapData, PeerKey4, PeerValue> = map("PEERS_V4").try_into().unwrap();
            for list in 0..8 {
                let list = list_bytes((epoch() & 1) as u8, list);
                let value = PeerValue { rule: 0, kind: PeerValue::ALLOW };
                peers.insert(&Key::new(64, PeerKey4 { list, address: [10, 0, 0, 33] }), value, 0).unwrap();
            }
        }),
        ("every link is detached", node, UntilNoticed, &|| {
            PROGRAMS.into_iter().for_each(|name| detach(&pins.join("links").join(name)))
        }),
    ];
    for (number, (deed, to, opens, act)) in deeds.iter().enumerate() {
        let before = lab.daemon().unwrap().status().unwrap().mended;
        let daemon = lab.daemon.as_ref().unwrap();
        let stop = AtomicBool::new(false);
        let (took, (sent, answered)) = std::thread::scope(|scope| {
            let knocking = scope.spawn(|| knock(&lab, *to, 10_000, ATTEMPTS, &stop));
            std::thread::sleep(Duration::from_millis(20));
            act();
            let started = Instant::now();
            let mended = until(deed, WITHIN, || Ok(daemon.status()?.mended > before));
            let took = started.elapsed();
            stop.store(true, Ordering::Relaxed);
            let knocked = knocking.join().unwrap();
            mended.unwrap();
            (took, knocked)
        });
        println!(
            "drift: {deed}: mended after {took:.1?}; {sent} attempts of a stranger meanwhile, {answered} answered"
        );
        assert!(sent >= ATTEMPTS);
        if *opens == Nothing {
            assert_eq!(answered, 0, "{deed}: a stranger was admitted");
        }
        let printed = daemon.printed();
        assert!(printed.matches("it is mended").count() > number, "{deed}: an ERROR says so\n{printed}");
        // A look in the middle of a deed leaves the rest for the next.
        let whole =
            || daemon.status().map(|now| now.programs.iter().all(|program| program.attached) && now.maps == maps);
        until(deed, WITHIN, whole).unwrap();
        for to in [node, pod] {
            assert_eq!(
                knock(&lab, to, 40_000, 40, &AtomicBool::new(true)).1,
                0,
                "{deed}: a stranger is admitted afterwards"
            );
            assert_eq!(lab.net.run(Who::Peer, || Ok(http(tcp(to), "/"))).unwrap(), Outcome::Http(200), "{deed}");
        }
        let echo = Who::Node.at(false, ECHO);
        assert_eq!(lab.net.run(Who::Peer, || lab::helper::udp_once(echo)).unwrap(), Answer::Reached, "{deed}");
    }
    let status = lab.daemon().unwrap().status().unwrap();
    let damaged = packets(&status, "table-damaged");
    println!("drift: {damaged} packets denied as table-damaged");
    assert!(damaged > 0, "{:?}", status.counters);
}

#[test]
fn who_came_in_while_a_link_was_off_is_cut() {
    let lab = lab();
    let pins = lab.pins();
    let to = Who::Node.at(false, HTTP);
    let connect = || Ok(TcpStream::connect_timeout(&to, Duration::from_millis(100)).ok());
    // Quick as the guard is, a stranger that waits for it is quicker, or soon will be.
    let came_in = (0..20).find_map(|_| {
        JUDGES.into_iter().for_each(|name| detach(&pins.join("links").join(name)));
        let stream = lab.net.run(Who::Stranger, connect).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        stream
    });
    let mut stream = came_in.expect("a stranger that came in");
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let cut = match stream.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    };
    assert!(cut, "the stranger goes on");
    assert_eq!(lab.net.run(Who::Stranger, connect).unwrap().map(drop), None, "and does not come again");
    assert!(lab.daemon.as_ref().unwrap().status().unwrap().cut >= 1);
}

/// What `bpftool link detach` does.
pub(crate) fn detach(pin: &Path) {
    const BPF_OBJ_GET: libc::c_long = 7;
    const BPF_LINK_DETACH: libc::c_long = 34;
    let bpf = |command: libc::c_long, attribute: [u64; 2], length: usize| {
        // SAFETY: `attribute` is the start of `union bpf_attr` for these commands, and lives through the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_ptr(), length) };
        assert!(result >= 0, "{}", std::io::Error::last_os_error());
        result as i32
    };
    let path = std::ffi::CString::new(pin.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: the kernel has just given this descriptor to us.
    let link = unsafe { OwnedFd::from_raw_fd(bpf(BPF_OBJ_GET, [path.as_ptr() as u64, 0], 16)) };
    bpf(BPF_LINK_DETACH, [link.as_raw_fd() as u64, 0], 4);
}
