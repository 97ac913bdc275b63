//! Owns trying the kernel half on the kernel that it runs on: every program loads and attaches, decides as the host code does, and judges
//! real connections on loopback.
//! Called as the first and only process of a virtual machine, or with `--host DIRECTORY` on a machine that runs already.
//! Must never attach outside the cgroup that it made, and in a virtual machine never end but by switching it off.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what goes wrong ends the trial with its reason on the console"
)]

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aya::include_bytes_aligned;
use guard_common::{
    Reason,
    abi::Pinhole,
    packet::{TCP, UDP},
};
use guard_policy::{compile::compile as compile_policy, diagnostic::Source};
use lab::{
    agree::compare,
    bench::print_line,
    judged::{Sender, check as check_shape, counts},
    packets::Flow,
    shapes::{all, flow_of},
    wire::{Wire, hardware},
};
use nix::mount::{MsFlags, mount};
use nodeguard::kernel::{
    links::{edge_hooks::EDGE_PROGRAMS, object::PROGRAMS, programs, programs::KernelHalf},
    pinholes::{KernelPinholes, OpenPinholes},
    pins::{Location, pins},
    tables::apply::Apply,
};
use nodeguard::sys::read_node_facts;

/// The kernel object with the entry points for test runs.
static PROBES: &[u8] = include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/guard-dev.o"));

/// Ports by what admits to them.
const POLICY: &str = "\
apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata: {name: guest}
spec:
  mode: Enforce
  guard:
    - {name: tunnel, node: {ports: [10250]}, allow: [tunnel: {}, ipBlock: {cidr: 127.0.0.2/32}]}
    - {name: node, node: {ports: [10251]}, allow: [node: {}]}
    - {name: caller, node: {ports: [10252]}, allow: [caller: {cgroup: /caller}]}
    - {name: udp, node: {ports: [10253], protocol: UDP}, allow: [ipBlock: {cidr: 127.0.0.2/32}]}
    - {name: node-udp, node: {ports: [10257], protocol: UDP}, allow: [node: {}]}
    - {name: web, pods: {cidrs: [10.244.1.0/24], ports: [8080]}, allow: []}
    - {name: pods, pods: {ports: [10254]}, allow: [ipBlock: {cidr: 127.0.0.2/32}]}
    - {name: shapes, node: {ports: [10255]}, allow: [tunnel: {}, ipBlock: {cidr: 127.0.0.2/32}, ipBlock: {cidr: 'fd00:8::/32'}]}
    - {name: shapes-udp, node: {ports: [10256], protocol: UDP}, allow: [ipBlock: {cidr: 127.0.0.2/32}, ipBlock: {cidr: 'fd00:8::/32'}]}
  tunnel: {dial: []}
  controlPlane: {addresses: [127.0.0.9/32], ports: [6443]}
";

/// The addresses of loopback, by what they are to the policy.
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];
/// The node's own address, which it has from the start, and one inside the pods' prefix that it gets later, as from a bridge.
const NODE: [u8; 4] = [10, 9, 0, 1];
const LATE: [u8; 4] = [10, 244, 1, 1];
const PEER: [u8; 4] = [127, 0, 0, 2];
const STRANGER: [u8; 4] = [127, 0, 0, 3];
const CONTROL_PLANE: [u8; 4] = [127, 0, 0, 9];

fn main() {
    let host = std::env::args().skip_while(|argument| argument != "--host").nth(1).map(PathBuf::from);
    let tried = std::panic::catch_unwind(|| match &host {
        Some(directory) => {
            let cgroup = nodeguard::kernel::cgroups::root::v2_root().unwrap().join(directory.file_name().unwrap());
            try_all(&cgroup, &directory.join("bpf"));
        }
        None => {
            mount_all();
            try_all(Path::new("/sys/fs/cgroup/tried"), Path::new("/sys/fs/bpf/nodeguard"));
        }
    });
    say(&format!("TRIED {}", if tried.is_ok() { "whole" } else { "broken" }));
    if host.is_none() {
        // Nothing was written that a clean end would save.
        nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF).unwrap();
    }
}

fn mount_all() {
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("devtmpfs", "/dev"),
    ] {
        fs::create_dir_all(at).ok();
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .unwrap_or_else(|error| panic!("{at}: {error}"));
    }
    up();
}

/// Brings loopback up: nobody else does it here.
fn up() {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    configure("0.0.0.0:0", libc::SIOCSIFFLAGS, &request);
}

/// Gives loopback another IPv4 address, by the name of an alias.
fn alias(name: &str, address: [u8; 4]) {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let SocketAddr::V4(at) = SocketAddr::from((address, 0)) else { return };
    // SAFETY: a `sockaddr_in` fits into the union's `sockaddr`, which has its size.
    unsafe {
        let to = (&raw mut request.ifr_ifru.ifru_addr).cast::<libc::sockaddr_in>();
        (*to).sin_family = libc::AF_INET as libc::sa_family_t;
        (*to).sin_addr.s_addr = u32::from_ne_bytes(at.ip().octets());
    }
    configure("0.0.0.0:0", libc::SIOCSIFADDR, &request);
}

/// Configures an interface by a socket of a family.
fn configure<T>(family: &str, what: libc::Ioctl, request: &T) {
    let socket = std::net::UdpSocket::bind(family).unwrap();
    // SAFETY: a socket of ours and a request that lives through the call, of the type that the callers' ioctl takes.
    let result = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), what, std::ptr::from_ref(request)) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn try_all(cgroup: &Path, bpffs: &Path) {
    for name in ["caller", "elsewhere"] {
        fs::create_dir_all(cgroup.join(name)).unwrap();
    }
    say(&format!("KERNEL {}", nix::sys::utsname::uname().unwrap().release().to_string_lossy()));
    join(&cgroup.join("elsewhere"));
    let location = Location { cgroup: cgroup.to_path_buf(), bpffs: bpffs.to_path_buf() };
    let KernelHalf { maps, cookies, mut programs, .. } = programs::open(&location).unwrap();
    let source = Source { path: "guest".into(), text: POLICY.to_owned() };
    alias("lo:1", NODE);
    // As the daemon reads them.
    let node = read_node_facts::read(&[]).unwrap();
    assert_eq!(node.addresses, [IpAddr::from(NODE)]);
    // Listeners from before the guard: one of the node on a port that a rule guards in every pod, one of a pod.
    let earlier = TcpListener::bind("0.0.0.0:10254").unwrap();
    let of_pod = in_a_namespace(|| TcpListener::bind("0.0.0.0:10250").unwrap());
    let ruleset = compile_policy(&source, &node).unwrap_or_else(|found| panic!("{}", source.render(&found, false))).0;
    let mut apply = Apply::new(maps).unwrap().below(cgroup);
    apply.apply(&Arc::new(ruleset)).unwrap();
    programs.attach().unwrap();
    for attachment in programs::attachments(bpffs) {
        let verified = programs.verified(&attachment.name);
        say(&format!(
            "PROGRAM {} {} {verified}",
            attachment.name,
            if attachment.attached { "attached" } else { "missing" }
        ));
    }
    assert_eq!(programs::attachments(bpffs).iter().filter(|program| program.attached).count(), PROGRAMS.len());
    say(&format!("NAMESPACE {}", if programs.netns_helper { "cookie" } else { "mark" }));
    let pinholes = KernelPinholes::new(cookies).unwrap();
    // Where the kernel lists no sockets (Debian has sock_diag in modules, which are not here), an earlier listener may be a pod's: doubt denies.
    let known = programs.knows_earlier_sockets;
    check("earlier-listener-of-the-node", connects(STRANGER, (NODE, 10254), None), known);
    drop((earlier, of_pod));
    connections(&pinholes, cgroup);
    alias("lo:2", LATE);
    check("late-address", connects_to_new((LATE, 10250)), false);
    check("loopback", connects_to_new((LOOPBACK, 10250)), false);
    a_pod();
    // The same with the edge tier before it, by whatever way this kernel has: loopback has no driver for XDP.
    let tier = programs.hold_edge(&["lo".to_owned()].into());
    let hook = tier.links.first().filter(|link| link.attached).map_or("none", |link| link.hook.as_str());
    say(&format!("EDGE {hook}"));
    for link in tier.links.iter().filter(|link| !link.note.is_empty()) {
        say(&format!("DETAIL edge tier on {}: {}", link.interface, link.note.replace('\n', " | ")));
    }
    check("edge-attached", hook != "none", true);
    for program in EDGE_PROGRAMS {
        say(&format!("PROGRAM {program} loaded {}", programs.verified(program)));
    }
    let before = dropped(&apply);
    connections(&pinholes, cgroup);
    check("edge-counts", dropped(&apply) > before, true);
    programs.hold_edge(&BTreeSet::new());
    let after = dropped(&apply);
    check("stranger-without-edge", connects(STRANGER, (NODE, 10250), None), false);
    check("edge-removed", dropped(&apply) == after, true);

    shapes(&apply, bpffs);

    let count =
        |name: &str, default: usize| std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default);
    let tally = compare(PROBES, count("RULESETS", 8), count("PACKETS", 500));
    let (compared, differences) = (tally.compared, tally.differences.len());
    say(&format!("CORPUS {compared} {differences}"));
    assert!(tally.differences.is_empty(), "{:#?}", tally.differences.first());
}

/// What the edge tier has dropped.
fn dropped(apply: &Apply) -> u64 {
    let of_edge = |reason| matches!(reason, Reason::EdgeNoSelector | Reason::EdgeExcept);
    apply.counters().unwrap().iter().filter(|(_, reason, ..)| of_edge(*reason)).map(|(.., packets)| packets).sum()
}

/// Real connections on loopback.
fn connections(pinholes: &KernelPinholes, cgroup: &Path) {
    let any = |port: u16| SocketAddr::from(([0, 0, 0, 0], port));
    let listeners: Vec<TcpListener> =
        [10250, 10251, 10252, 10254, 6443, 2379].map(|port| TcpListener::bind(any(port)).unwrap()).into();
    check("stranger", connects(STRANGER, (NODE, 10250), None), false);
    check("ip-block", connects(PEER, (NODE, 10250), None), true);
    check("tunnel", connects(STRANGER, (NODE, 10250), Some(pinholes)), true);
    check("node", connects(STRANGER, (NODE, 10251), None), true);
    check("not-the-caller", connects(PEER, (NODE, 10252), None), false);
    join(&cgroup.join("caller"));
    check("caller", connects(STRANGER, (NODE, 10252), None), true);
    join(&cgroup.join("elsewhere"));
    // All of this is the node's own network namespace, or an address of the node: no pod's.
    check("no-pod", connects(STRANGER, (NODE, 10254), None), true);
    check("control-plane", connects(STRANGER, (CONTROL_PLANE, 6443), None), true);
    check("control-plane-port", connects(STRANGER, (CONTROL_PLANE, 2379), None), false);
    let server = std::net::UdpSocket::bind(any(10253)).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let heard = |from: [u8; 4]| {
        let sender = std::net::UdpSocket::bind(SocketAddr::from((from, 0))).unwrap();
        sender.send_to(b"x", SocketAddr::from((NODE, 10253))).unwrap();
        server.recv_from(&mut [0; 1]).is_ok()
    };
    check("udp-stranger", heard(STRANGER), false);
    check("udp-ip-block", heard(PEER), true);
    let server = std::net::UdpSocket::bind(any(10257)).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let sender = std::net::UdpSocket::bind(any(0)).unwrap();
    sender.send_to(b"x", SocketAddr::from((NODE, 10257))).unwrap();
    check("udp-node", server.recv_from(&mut [0; 1]).is_ok(), true);
    drop(listeners);
}

/// Whether a listener that begins now is reached by a stranger.
fn connects_to_new(to: ([u8; 4], u16)) -> bool {
    let _listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], to.1))).unwrap();
    connects(STRANGER, to, None)
}

/// What a pod does in its own network namespace, over its own loopback.
fn a_pod() {
    in_a_namespace(|| {
        // A rule for the node's port is not a pod's; a rule for a pod's port does not keep the pod from itself.
        check("pod-with-the-nodes-port", connects_to_new((LOOPBACK, 10250)), true);
        check("pod-to-itself", connects_to_new((LOOPBACK, 10254)), true);
        check("pod-to-itself-by-prefix", connects_to_new((LOOPBACK, 8080)), true);
    });
}

/// Runs code in a new network namespace with loopback up.
fn in_a_namespace<T: Send>(code: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        up();
        code()
    };
    std::thread::scope(|scope| scope.spawn(inside).join()).unwrap()
}

/// Every shape of packet, over loopback.
fn shapes(apply: &Apply, bpffs: &Path) {
    // What comes by the wire there has this machine's own addresses on both ends.
    for (name, value) in [
        ("lo/route_localnet", "1"),
        ("lo/accept_local", "1"),
        ("all/accept_local", "1"),
        ("lo/rp_filter", "0"),
        ("all/rp_filter", "0"),
    ] {
        fs::write(format!("/proc/sys/net/ipv4/conf/{name}"), value).unwrap();
    }
    let address = |v6: bool, last: u8| -> IpAddr {
        if v6 {
            let block = if last == 2 { "fd00:8:" } else { "fd00:" };
            format!("{block}:{last}").parse().unwrap()
        } else {
            [127, 0, 0, last].into()
        }
    };
    let (node, peer, stranger) = (1, 2, 3);
    [node, peer, stranger].into_iter().for_each(|last| add_to_loopback(address(true, last)));
    // At these addresses alone: answers go to the senders' own on the same loopback, and come from where the packet went.
    let at = |v6: bool, port: u16| SocketAddr::new(address(v6, node), port);
    let listeners = [false, true].map(|v6| once_it_is_there(|| TcpListener::bind(at(v6, 10255))));
    for v6 in [false, true] {
        let echo = once_it_is_there(|| std::net::UdpSocket::bind(at(v6, 10256)));
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((count, from)) = echo.recv_from(&mut buffer) {
                // To port 0 nothing can be sent.
                let _ = echo.send_to(&buffer[..count], from);
            }
        });
    }
    let mut pinholes = OpenPinholes::pinned(&pins(bpffs), "PINHOLES").unwrap();
    let wire = Wire::open("lo", [0; 6]).unwrap();
    for (number, shape) in all().iter().enumerate() {
        let mut wrong = Vec::new();
        for sender in [Sender::Stranger, Sender::Peer, Sender::Pinhole] {
            if sender == Sender::Pinhole && shape.protocol != TCP {
                continue;
            }
            let port = if shape.protocol == UDP { 10256 } else { 10255 };
            let from = address(shape.v6, if sender == Sender::Peer { peer } else { stranger });
            let own = 20_000 + 4 * number as u16 + sender as u16;
            let flow = Flow { from: SocketAddr::new(from, own), to: at(shape.v6, port) };
            if sender == Sender::Pinhole {
                pinholes.insert(flow_of(shape, flow).key(), Pinhole::of(Pinhole::TUNNEL)).unwrap();
            }
            wrong.extend(check_shape(shape, sender, flow, &wire, &|| counts(apply)).err());
        }
        for error in &wrong {
            say(&format!("DETAIL {error:#}"));
        }
        say(&format!("SHAPE {} {}", if wrong.is_empty() { "as-expected" } else { "WRONG" }, shape.name));
    }
    drop(listeners);
}

/// Binds to an address that was added just now: IPv6 takes a moment to make one usable.
fn once_it_is_there<T>(bind: impl Fn() -> std::io::Result<T>) -> T {
    for _ in 0..200 {
        if let Ok(bound) = bind() {
            return bound;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bind().unwrap()
}

/// Gives loopback another IPv6 address.
fn add_to_loopback(address: IpAddr) {
    let IpAddr::V6(address) = address else { return };
    let request = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr { s6_addr: address.octets() },
        ifr6_prefixlen: 128,
        ifr6_ifindex: hardware("lo").unwrap().0,
    };
    configure("[::]:0", libc::SIOCSIFADDR, &request);
}

/// Whether a connection opens. With pinholes it is made as the daemon does: the socket is registered first.
fn connects(from: [u8; 4], to: ([u8; 4], u16), pinholes: Option<&KernelPinholes>) -> bool {
    use nodeguard::kernel::pinholes::Pinholes;
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    if let Some(pinholes) = pinholes {
        pinholes.register(socket.cookie().unwrap()).unwrap();
    }
    socket.connect_timeout(&SocketAddr::from(to).into(), Duration::from_millis(700)).is_ok()
}

/// Joins a cgroup: sockets that are made from here on belong to it.
fn join(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
}

fn check(what: &str, seen: bool, wanted: bool) {
    say(&format!("CONNECTION {what} {}", if seen == wanted { "as-expected" } else { "WRONG" }));
}

fn say(text: &str) {
    print_line(text).unwrap();
}
