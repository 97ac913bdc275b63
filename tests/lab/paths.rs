//! Shapes that take more than a packet: handshakes by cookies, fast open, joins, both ends at once; and the ways that packets come by: translated,
//! over a bridge, from another namespace, over loopback, in pages.

use std::{
    fs::{self, File},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use etherparse::TcpHeader;
use lab::{
    client::{Outcome, http, tcp},
    helper::Answer,
    judged::{Counts, moved},
    lab::Lab,
    net::{SWITCH, Who, inside, ip as ip_command, name, on_a_thread, port},
    packets::{ACK, DESTINATION_OPTIONS, Flow, HOP_BY_HOP, Heard, PSH, SYN, Segment, heard, ip, padding, v4},
    process::until,
    shapes::{MP_CAPABLE, fast_open, join},
    wire::{Wire, hardware},
};

use crate::shapes::{HTTP, Pinholes, WEB, counter, in_node, lab, silent, wire};

const SOON: Duration = Duration::from_secs(3);
const NEVER: Duration = Duration::from_millis(60);
/// Guarded like [`HTTP`]; nobody listens there before a test does.
const SPARE: u16 = 10_259;
const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: node\r\n\r\n";

/// A hand-made end of TCP conversations.
struct By {
    wire: Wire,
    from: IpAddr,
}

impl By {
    fn new(lab: &Lab, who: Who, v6: bool) -> By {
        By { wire: wire(lab, who), from: silent(who, v6) }
    }

    fn flow(&self, port: u16, to: SocketAddr) -> Flow {
        Flow { from: SocketAddr::new(self.from, port), to }
    }

    fn say(&self, flow: Flow, segment: Segment<'_>) {
        self.wire.send(&ip(flow, 6, &lab::packets::tcp(flow, segment))).unwrap();
    }

    /// The next segment on a flow for which something holds.
    fn hear(
        &self,
        flow: Flow,
        patience: Duration,
        wanted: impl Fn(&TcpHeader, &[u8]) -> bool,
    ) -> Option<Box<TcpHeader>> {
        let until = Instant::now() + patience;
        while let Some(packet) = self.wire.receive(until.saturating_duration_since(Instant::now())).unwrap() {
            match heard(flow, &packet) {
                Some(Heard::Tcp(header, data)) if wanted(&header, &data) => return Some(header),
                _ => {}
            }
        }
        None
    }

    /// A SYN, and the SYN-ACK to it.
    fn syn(&self, flow: Flow, options: &[u8], data: &[u8], patience: Duration) -> Option<Box<TcpHeader>> {
        self.say(flow, Segment { flags: SYN, seq: 1000, options, data, ..Segment::default() });
        let header = self.hear(flow, patience, |_, _| true)?;
        assert!(is_syn_ack(&header), "{header:?}");
        Some(header)
    }

    /// The rest of a handshake with a request behind it; whether it is served.
    fn served(&self, flow: Flow, seq: u32) -> bool {
        self.say(flow, Segment { flags: ACK | PSH, seq: 1001, ack: seq.wrapping_add(1), options: &[], data: GET });
        self.hear(flow, SOON, |_, data| data.starts_with(b"HTTP/1.1 200")).is_some()
    }
}

fn is_syn_ack(header: &TcpHeader) -> bool {
    header.syn && header.ack && !header.rst && !header.fin && !header.psh && !header.urg
}

/// The value of a TCP option of a kind.
fn option(header: &TcpHeader, kind: u8) -> Option<&[u8]> {
    let mut rest = header.options.as_slice();
    loop {
        match rest {
            [1, more @ ..] => rest = more,
            [found, length, ..] if *length >= 2 => {
                let value = rest.get(2..usize::from(*length))?;
                if *found == kind {
                    return Some(value);
                }
                rest = rest.get(usize::from(*length)..)?;
            }
            _ => return None,
        }
    }
}

fn sysctl(lab: &Lab, name: &str, value: &str) {
    lab.net.run(Who::Node, || Ok(fs::write(format!("/proc/sys/net/{name}"), value)?)).unwrap();
}

fn node(v6: bool, port: u16) -> SocketAddr {
    Who::Node.at(v6, port)
}

/// What was denied since, by reason; waits until so many were.
fn denied(counts: &dyn Fn() -> anyhow::Result<Counts>, before: &Counts, wanted: u64) -> u64 {
    let now = || moved(before, &counts().unwrap()).get("no-selector").copied().unwrap_or(0);
    let _ = until("denials", Duration::from_secs(2), || Ok(now() >= wanted));
    now()
}

#[test]
fn syn_cookies_change_nothing() {
    let lab = lab();
    sysctl(&lab, "ipv4/tcp_syncookies", "2");
    let (counts, mut pinholes) = (counter(&lab), Pinholes::of(&lab));
    for v6 in [false, true] {
        let (stranger, peer) = (By::new(&lab, Who::Stranger, v6), By::new(&lab, Who::Peer, v6));
        let before = counts().unwrap();
        let flow = peer.flow(30_000, node(v6, HTTP));
        let cookie = peer.syn(flow, &[], &[], SOON).expect("a cookie").sequence_number;
        assert!(peer.served(flow, cookie), "the peer's cookie is taken");
        // The ACK of a handshake by cookie is for the listener itself, and judged like a SYN.
        let flow = stranger.flow(30_001, node(v6, HTTP));
        assert!(stranger.syn(flow, &[], &[], NEVER).is_none());
        stranger.say(flow, Segment { flags: ACK, seq: 1001, ack: cookie.wrapping_add(1), options: &[], data: GET });
        assert!(stranger.hear(flow, NEVER, |_, _| true).is_none(), "no RST either");
        let flow = stranger.flow(30_002, node(v6, HTTP));
        pinholes.open(flow);
        let cookie = stranger.syn(flow, &[], &[], SOON).expect("a pinhole admits").sequence_number;
        assert!(stranger.served(flow, cookie));
        assert_eq!(denied(&counts, &before, 2), 2);
    }
}

#[test]
fn fast_open_with_a_good_cookie_needs_a_rule_too() {
    let mut lab = lab();
    let (counts, mut pinholes) = (counter(&lab), Pinholes::of(&lab));
    let (stranger, peer) = (By::new(&lab, Who::Stranger, false), By::new(&lab, Who::Peer, false));
    // Server, every listener: those that are made from here on.
    sysctl(&lab, "ipv4/tcp_fastopen", "1027");
    lab.start_in(Who::Node, "", &["pod", &format!("[::]:{SPARE}")]).unwrap();
    let cookie = |by: &By, port: u16| {
        let answer = by.syn(by.flow(port, node(false, SPARE)), &fast_open(&[]), &[], SOON).expect("a SYN-ACK");
        option(&answer, 34).expect("a cookie").to_vec()
    };
    let acknowledged = 1001 + GET.len() as u32;
    let with_cookie = fast_open(&cookie(&peer, 30_010));
    let flow = peer.flow(30_011, node(false, SPARE));
    let answer = peer.syn(flow, &with_cookie, GET, SOON).expect("a SYN-ACK");
    assert_eq!(answer.acknowledgment_number, acknowledged, "the data in the SYN is taken");
    // The stranger's cookie is a good one, from a flow that had a pinhole.
    pinholes.open(stranger.flow(30_012, node(false, SPARE)));
    let with_cookie = fast_open(&cookie(&stranger, 30_012));
    let before = counts().unwrap();
    let flow = stranger.flow(30_013, node(false, SPARE));
    assert!(stranger.syn(flow, &with_cookie, GET, NEVER).is_none());
    // And no cookie is needed.
    sysctl(&lab, "ipv4/tcp_fastopen", "1539");
    assert!(stranger.syn(stranger.flow(30_014, node(false, SPARE)), &[], GET, NEVER).is_none());
    let answer = peer.syn(peer.flow(30_015, node(false, SPARE)), &[], GET, SOON).expect("a SYN-ACK");
    assert_eq!(answer.acknowledgment_number, acknowledged);
    assert_eq!(denied(&counts, &before, 2), 2);
}

#[test]
fn a_join_with_the_right_token_needs_a_rule_too() {
    let mut lab = lab();
    lab.start_in(Who::Node, "", &["mptcp", &format!("0.0.0.0:{SPARE}")]).unwrap();
    let counts = counter(&lab);
    let (stranger, peer) = (By::new(&lab, Who::Stranger, false), By::new(&lab, Who::Peer, false));
    let flow = peer.flow(30_020, node(false, SPARE));
    let answer = peer.syn(flow, &MP_CAPABLE, &[], SOON).expect("a SYN-ACK");
    let server_key: Vec<u8> = option(&answer, 30).expect("it speaks MPTCP")[2..10].to_vec();
    let keys = [&[30, 20, 1, 1][..], &[9; 8], &server_key].concat();
    let ack = answer.sequence_number.wrapping_add(1);
    peer.say(flow, Segment { flags: ACK, seq: 1001, ack, options: &keys, data: &[] });
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &server_key);
    let token: [u8; 4] = digest.as_ref()[..4].try_into().unwrap();
    let joined = |by: &By, port: u16, patience| by.syn(by.flow(port, node(false, SPARE)), &join(token), &[], patience);
    let answer = joined(&peer, 30_021, SOON).expect("the peer joins");
    assert_eq!(option(&answer, 30).map(|value| value[0] >> 4), Some(1), "MP_JOIN");
    let before = counts().unwrap();
    assert!(joined(&stranger, 30_022, NEVER).is_none(), "the same token from a stranger");
    let unknown = join([1, 2, 3, 4]);
    let flow = stranger.flow(30_023, node(false, SPARE));
    stranger.say(flow, Segment { flags: SYN, seq: 1000, options: &unknown, ..Segment::default() });
    assert!(stranger.hear(flow, NEVER, |_, _| true).is_none(), "an unknown one draws no RST");
    assert_eq!(denied(&counts, &before, 2), 2);
}

#[test]
fn both_ends_at_once_is_the_nodes_own_connection() {
    let mut lab = lab();
    let counts = counter(&lab);
    let by = By::new(&lab, Who::Stranger, false);
    // From a guarded port, as only the node itself can.
    let flow = by.flow(5555, node(false, SPARE));
    let from = node(false, SPARE).to_string();
    let log = lab.start_in(Who::Node, "", &["meet", &from, &flow.from.to_string()]).unwrap();
    let before = counts().unwrap();
    let seq = by.hear(flow, SOON, |header, _| header.syn && !header.ack).expect("a SYN").sequence_number;
    // While it waits for a SYN-ACK, a SYN of the same flow; and one of another, where nobody listens.
    by.say(flow, Segment { flags: SYN, seq: 1000, ..Segment::default() });
    assert!(by.hear(flow, SOON, |header, _| is_syn_ack(header)).is_some());
    by.say(flow, Segment { flags: ACK, seq: 1001, ack: seq.wrapping_add(1), ..Segment::default() });
    until("it is connected", SOON, || Ok(fs::read_to_string(&log)?.contains("connected"))).unwrap();
    assert_eq!(moved(&before, &counts().unwrap()), Counts::new(), "nothing was judged");
}

#[test]
fn source_equals_destination() {
    let lab = lab();
    let counts = counter(&lab);
    let by = wire(&lab, Who::Stranger);
    let land = |v6| {
        let flow = Flow { from: node(v6, HTTP), to: node(v6, HTTP) };
        let before = counts().unwrap();
        by.send(&ip(flow, 6, &lab::packets::tcp(flow, Segment { flags: SYN, seq: 1, ..Segment::default() }))).unwrap();
        std::thread::sleep(NEVER);
        moved(&before, &counts().unwrap())
    };
    assert_eq!(land(false), Counts::new(), "Linux takes its own address as a source for martian");
    assert_eq!(land(true), Counts::from([("no-selector", 1)]));
    for name in ["all", "eth0"] {
        sysctl(&lab, &format!("ipv4/conf/{name}/accept_local"), "1");
        sysctl(&lab, &format!("ipv4/conf/{name}/rp_filter"), "0");
    }
    assert_eq!(land(false), Counts::from([("no-selector", 1)]), "the node's own address is no pinhole");
}

#[test]
fn headers_outside_the_linear_part() {
    let lab = lab();
    for who in [Who::Stranger, Who::Peer, Who::Node] {
        ip_command(&["-n", &name(&lab.id, SWITCH), "link", "set", &port(who.name()), "mtu", "9000"], "").unwrap();
        lab.net.ip(who, &["link", "set", "eth0", "mtu", "9000"]).unwrap();
    }
    let counts = counter(&lab);
    let data = vec![b'x'; 4500];
    let mut port = 30_030;
    for v6 in [false, true] {
        let (stranger, peer) = (By::new(&lab, Who::Stranger, v6), By::new(&lab, Who::Peer, v6));
        for plain in [true, false] {
            let packet = |flow: Flow| {
                let segment =
                    lab::packets::tcp(flow, Segment { flags: SYN, seq: 1000, data: &data, ..Segment::default() });
                match (v6, plain) {
                    (_, true) => ip(flow, 6, &segment),
                    (false, false) => v4(flow, 6, &[1; 40], &segment),
                    (true, false) => {
                        lab::packets::v6(flow, &[padding(HOP_BY_HOP), padding(DESTINATION_OPTIONS)], 6, &segment)
                    }
                }
            };
            port += 1;
            let before = counts().unwrap();
            let flow = stranger.flow(port, node(v6, HTTP));
            wire(&lab, Who::Stranger).send_paged(&packet(flow)).unwrap();
            assert!(stranger.hear(flow, NEVER, |_, _| true).is_none());
            assert_eq!(denied(&counts, &before, 1), 1, "v6 {v6}, plain {plain}");
            let flow = peer.flow(port, node(v6, HTTP));
            wire(&lab, Who::Peer).send_paged(&packet(flow)).unwrap();
            assert!(peer.hear(flow, SOON, |header, _| is_syn_ack(header)).is_some(), "v6 {v6}, plain {plain}");
            assert_eq!(denied(&counts, &before, 1), 1);
        }
    }
}

/// Asks a port over plain HTTP.
fn ask(lab: &Lab, who: Who, to: SocketAddr) -> Outcome {
    lab.net.run(who, || Ok(http(tcp(to), "/"))).unwrap()
}

#[test]
fn translated_destinations_are_judged_where_they_arrive() {
    let lab = lab();
    let rules = format!(
        "table inet guard_test {{
            chain pre {{
                type nat hook prerouting priority -100;
                meta nfproto ipv4 tcp dport {{ 30080, 8088 }} dnat ip to 10.244.1.2:8080
                meta nfproto ipv6 tcp dport {{ 30080, 8088 }} dnat ip6 to [fd01:244:1::2]:8080
                meta nfproto ipv4 tcp dport 30081 ct mark set 1 dnat ip to 10.244.1.2:8080
                tcp dport 20251 redirect to :{HTTP}
            }}
            chain post {{
                type nat hook postrouting priority 100;
                ct mark 1 masquerade
            }}
        }}\n"
    );
    let file = lab.directory.join("nat.nft");
    fs::write(&file, rules).unwrap();
    in_node(&lab, &["nft", "-f", &file.display().to_string()]);
    let counts = counter(&lab);
    for v6 in [false, true] {
        // A node port, a host port, and a port of the node itself.
        for port in [30_080, 8088, 20_251] {
            let before = counts().unwrap();
            assert_eq!(ask(&lab, Who::Peer, node(v6, port)), Outcome::Http(200), "{port}");
            assert_eq!(denied(&counts, &before, 0), 0);
            assert_eq!(ask(&lab, Who::Stranger, node(v6, port)), Outcome::NoAnswer, "{port}");
            assert_eq!(denied(&counts, &before, 1), 1, "{port}");
        }
    }
    // Where the source is translated too, the pod sees the node's address, which no rule names here.
    let before = counts().unwrap();
    assert_eq!(ask(&lab, Who::Peer, node(false, 30_081)), Outcome::NoAnswer);
    assert!(denied(&counts, &before, 1) >= 1);
}

/// A network namespace that no name holds.
fn another_namespace() -> File {
    on_a_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(File::open("/proc/thread-self/ns/net")?)
    })
    .unwrap()
}

#[test]
fn over_a_bridge_and_from_another_namespace() {
    let mut lab = lab();
    in_node(&lab, &["ip", "link", "add", "br1", "type", "bridge", "mcast_snooping", "0"]);
    in_node(&lab, &["ip", "address", "add", "10.244.2.1/24", "dev", "br1"]);
    in_node(&lab, &["ip", "link", "set", "br1", "up"]);
    let pods = [2, 3].map(|number: u8| {
        let namespace = another_namespace();
        let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&namespace));
        let port = format!("pod{number}");
        in_node(&lab, &["ip", "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &path]);
        in_node(&lab, &["ip", "link", "set", &port, "master", "br1", "up"]);
        let enter = format!("--net={path}");
        let address = format!("10.244.2.{number}/24");
        for words in [
            &["ip", "address", "add", &address, "dev", "eth0"][..],
            &["ip", "link", "set", "eth0", "up"],
            &["ip", "link", "set", "lo", "up"],
            &["ip", "route", "add", "default", "via", "10.244.2.1"],
        ] {
            in_node(&lab, &[&["nsenter", &enter][..], words].concat());
        }
        namespace
    });
    lab.start_at(pods[0].try_clone().unwrap(), "", &["pod", &format!("0.0.0.0:{WEB}")]).unwrap();
    for who in [Who::Stranger, Who::Peer] {
        let namespace = lab.net.namespace(who);
        in_node(&lab, &["ip", "-n", &namespace, "route", "add", "10.244.2.0/24", "via", "10.0.0.2"]);
    }
    let counts = counter(&lab);
    let to: SocketAddr = format!("10.244.2.2:{WEB}").parse().unwrap();
    let from_pod = |to: SocketAddr| inside(&pods[1], || Ok(http(tcp(to), "/"))).unwrap();
    for nf_call in ["0", "1"] {
        // Whether bridged packets pass the IP hooks too.
        sysctl(&lab, "bridge/bridge-nf-call-iptables", nf_call);
        let before = counts().unwrap();
        assert_eq!(ask(&lab, Who::Peer, to), Outcome::Http(200), "routed to the bridge");
        assert_eq!(denied(&counts, &before, 0), 0);
        assert_eq!(ask(&lab, Who::Stranger, to), Outcome::NoAnswer);
        assert_eq!(denied(&counts, &before, 1), 1);
        // From port to port of the bridge: no routing, no address of the node.
        assert_eq!(from_pod(to), Outcome::NoAnswer);
        assert_eq!(denied(&counts, &before, 2), 2);
        assert_eq!(from_pod(node(false, HTTP)), Outcome::NoAnswer, "a pod to the node");
        assert_eq!(denied(&counts, &before, 3), 3);
    }
}

#[test]
fn loopback_is_no_free_pass() {
    let lab = lab();
    let counts = counter(&lab);
    let (_, own) = lab.net.run(Who::Node, || hardware("lo")).unwrap();
    assert_eq!(own, [0; 6]);
    for to in ["127.0.0.1", "127.9.9.9", "10.0.0.2", "::1", "fd00::2"] {
        let before = counts().unwrap();
        let to = SocketAddr::new(to.parse().unwrap(), HTTP);
        assert_eq!(lab.once(Who::Node, "", "tcp", to).unwrap(), Answer::NoAnswer, "{to}");
        assert_eq!(denied(&counts, &before, 1), 1, "{to}");
    }
    // Inside a pod it is the pod's own, and no address of a pod: nobody's rule.
    assert_eq!(lab.once(Who::Pod, "", "tcp", format!("127.0.0.1:{WEB}").parse().unwrap()).unwrap(), Answer::Reached);
}
