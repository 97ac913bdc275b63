//! The edge tier: strangers are dropped on the uplink and counted, and everybody who may come, or was asked to, comes as before.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::AtomicUsize,
    time::Duration,
};

use aya::programs::{
    Xdp,
    xdp::{XdpLinkId, XdpMode},
};
use lab::{
    client::{Outcome, https, knock, tcp, through},
    daemon::packets as count,
    lab::{KUBELET, Lab, POD_PORTS, POLICY},
    main_job::main_job,
    net::Who,
    process::until,
    table::Table,
};
use nodeguard::{kernel::links::edge_hooks::EdgeLink, report::status::Status};

use crate::{drift::detach, flood};

const WITHIN: Duration = Duration::from_secs(10);

/// The lab's policy with the edge tier on these interfaces.
pub(crate) fn with_edge(policy: &str, interfaces: &str) -> String {
    format!("{policy}  edge: {{interfaces: [{interfaces}]}}\n")
}

/// The tier on an interface.
fn on(status: &Status, interface: &str) -> EdgeLink {
    status.edge.iter().find(|link| link.interface == interface).cloned().unwrap_or_default()
}

fn kubelet(v6: bool) -> SocketAddr {
    Who::Node.at(v6, KUBELET)
}

/// Who comes when the tier is on the uplink, by whatever hook.
fn who_comes(lab: &mut Lab) {
    let before = lab.daemon().unwrap().status().unwrap();
    let from = |lab: &Lab, who: Who, v6: bool| lab.healthz(who, v6).unwrap();
    for v6 in [false, true] {
        assert_eq!(from(lab, Who::Stranger, v6), Outcome::NoAnswer);
        assert_eq!(from(lab, Who::Excepted, v6), Outcome::NoAnswer);
        assert_eq!(from(lab, Who::Peer, v6), Outcome::Http(200));
        assert_eq!(lab.healthz_dialled(&kubelet(v6).to_string()).unwrap(), Outcome::Http(200));
        // A pod's port of an unguarded number, and a pod's guarded one: neither is the node's.
        let [guarded, open] = POD_PORTS.map(|port| Who::Pod.at(v6, port));
        let pod = |to| lab.net.run(Who::Stranger, || Ok(lab::client::http(tcp(to), "/"))).unwrap();
        assert_eq!((pod(guarded), pod(open)), (Outcome::NoAnswer, Outcome::Http(200)));
    }
    // Not from the uplink: the guard denies it.
    assert_eq!(from(lab, Who::Pod, false), Outcome::NoAnswer);
    let after = lab.daemon().unwrap().status().unwrap();
    let moved = |reason| count(&after, reason) - count(&before, reason);
    // A SYN is sent once within the patience of an attempt.
    assert_eq!((moved("edge-no-selector"), moved("edge-except")), (2, 2), "{:?}", after.counters);
    assert_eq!(moved("except"), 0, "what is dropped at the edge does not come to the guard");
    assert_eq!(moved("no-selector"), 3, "two to a pod's port, one from the pod");
    let told = after
        .last_denies
        .iter()
        .any(|event| event.reason == "edge-no-selector" && event.source.to_string().starts_with("10.0.0.3:"));
    assert!(told, "{:?}", after.last_denies);
}

#[test]
fn strangers_are_dropped_at_the_edge_and_nobody_else() {
    drops_strangers(Lab::new(&with_edge(POLICY, "eth0")).unwrap());
}

/// Whatever the guard of the lab may do.
pub(crate) fn drops_strangers(mut lab: Lab) {
    let status = lab.daemon().unwrap().status().unwrap();
    let link = on(&status, "eth0");
    assert_eq!((link.hook.as_str(), link.attached, link.note.as_str()), ("xdp", true, ""), "{:?}", status.edge);
    assert!(lab.daemon().unwrap().said("status", &[]).unwrap().text().contains("eth0   yes        xdp"));
    who_comes(&mut lab);

    // In audit nothing is dropped anywhere, and no packet is counted as the edge's.
    lab.write_policy(&with_edge(&POLICY.replace("mode: Enforce", "mode: Audit"), "eth0")).unwrap();
    let daemon = lab.daemon.as_ref().unwrap();
    daemon.in_force_after(status.policy.epoch).unwrap();
    let before = daemon.status().unwrap();
    assert_eq!(lab.healthz(Who::Stranger, false).unwrap(), Outcome::Http(200));
    let after = daemon.status().unwrap();
    assert_eq!(count(&before, "edge-no-selector"), count(&after, "edge-no-selector"));
    assert!(count(&after, "no-selector") > count(&before, "no-selector"));
}

#[test]
fn connections_that_began_before_and_those_of_the_node_itself_are_not_disturbed() {
    let lab = Lab::new(POLICY).unwrap();
    let peer = lab.net.run(Who::Peer, || Ok(TcpStream::connect_timeout(&kubelet(false), WITHIN)?)).unwrap();
    let ca = lab.certs.path("ca.crt");
    let held = through(lab.server().unwrap(), "10.0.0.2:10250").map_err(|outcome| format!("{outcome:?}")).unwrap();
    lab.write_policy(&with_edge(
        &POLICY.replace("node: {ports: [10250]}\n      allow", "node: {ports: [10250-10251]}\n      allow"),
        "eth0",
    ))
    .unwrap();
    let daemon = lab.daemon.as_ref().unwrap();
    until("the tier is on eth0", WITHIN, || Ok(on(&daemon.status()?, "eth0").attached)).unwrap();
    assert!(lab::client::upgraded_echo(held, &ca).unwrap() > 60_000, "a dial from before");
    let stream: Box<dyn lab::client::Stream> = Box::new(peer);
    assert_eq!(https(Ok(stream), "/healthz", &ca), Outcome::Http(200), "a peer's connection from before");

    // Where nobody listens the kernel refuses, as without the tier: the destination may yet be translated.
    let nobody = Who::Node.at(false, KUBELET + 1);
    let answer = lab.net.run(Who::Stranger, || Ok(tcp(nobody).map(|_| ()))).unwrap();
    assert!(matches!(&answer, Err(Outcome::Error(text)) if text.contains("refused")), "{answer:?}");

    // The node asks a stranger, from a port that is guarded on the node: what comes back is an answer, to the last byte.
    let to = Who::Stranger.at(false, 7777);
    let listener = lab.net.run(Who::Stranger, || Ok(TcpListener::bind(to)?)).unwrap();
    let answering = std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().unwrap();
        let sent = vec![7u8; 1 << 20];
        stream.write_all(&sent).unwrap();
        from
    });
    let from = Who::Node.at(false, KUBELET + 1);
    let got = lab
        .net
        .run(Who::Node, || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&from.into())?;
            socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
            let mut stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(WITHIN))?;
            let mut got = Vec::new();
            stream.read_to_end(&mut got)?;
            Ok(got.len())
        })
        .unwrap();
    assert_eq!(got, 1 << 20);
    assert_eq!(answering.join().unwrap(), from);
}

#[test]
fn the_main_job_ends_the_same_but_for_who_counts_the_strangers() {
    let mut lab = Lab::new(&with_edge(POLICY, "eth0")).unwrap();
    let mut table = Table::default();
    main_job(&mut lab, &mut table).unwrap();
    let edge = ["no-selector", "except"].map(|why| format!("wanted no answer, {why}, saw no answer, edge-{why}"));
    let (_, other) = table.sum().unwrap();
    let (at_the_edge, wrong): (Vec<_>, Vec<_>) =
        other.iter().partition(|line| edge.iter().any(|edge| line.ends_with(edge)));
    assert_eq!(wrong, [""; 0]);
    assert_eq!(at_the_edge.len(), 6, "stranger, control plane and excepted to kubelet, of both families");
}

/// An XDP program of somebody else on the node's uplink, as long as this is held.
fn occupy(lab: &Lab) -> (aya::Ebpf, XdpLinkId) {
    let object = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/guard.o")).unwrap();
    let mut other = lab::agree::load(&object);
    let program = <&mut Xdp>::try_from(other.program_mut("guard_edge").unwrap()).unwrap();
    program.load().unwrap();
    let id = lab.net.run(Who::Node, || Ok(program.attach("eth0", XdpMode::Driver)?)).unwrap();
    (other, id)
}

#[test]
fn where_xdp_is_taken_it_falls_back_to_tcx_and_says_so() {
    let mut lab = Lab::bare().unwrap();
    let others = occupy(&lab);
    lab.write_policy(&with_edge(POLICY, "eth0")).unwrap();
    lab.start_server(lab::certs::ServerCert::Good).unwrap();
    lab.start_daemon().unwrap().connected().unwrap();
    let link = on(&lab.daemon().unwrap().status().unwrap(), "eth0");
    assert_eq!((link.hook.as_str(), link.attached), ("tcx", true), "{link:?}");
    assert!(link.note.contains("xdp:"), "{link:?}");
    let daemon = lab.daemon.as_ref().unwrap();
    assert!(daemon.printed().contains("edge tier attached with a fallback hook"), "{}", daemon.printed());
    assert!(daemon.status().unwrap().weakened.iter().all(|weakness| !weakness.message.contains("edge")));
    who_comes(&mut lab);
    drop(others);
}

#[test]
fn interfaces_come_and_go_and_a_killed_daemon_leaves_the_tier() {
    let mut lab = Lab::new(&with_edge(POLICY, "eth0, later0")).unwrap();
    let status = |lab: &Lab| lab.daemon.as_ref().unwrap().status().unwrap();
    let first = on(&status(&lab), "eth0");
    let waits = on(&status(&lab), "later0");
    assert!(first.attached && !waits.attached && waits.note.contains("does not exist"), "{waits:?}");
    let told = |status: &Status| status.weakened.iter().any(|weakness| weakness.message.contains("later0"));
    assert!(told(&status(&lab)), "{:?}", status(&lab).weakened);

    // It comes, and is taken; it goes, and is told.
    lab.net.ip(Who::Node, &["link", "add", "later0", "type", "veth", "peer", "name", "later1"]).unwrap();
    until("later0 is taken", WITHIN, || Ok(on(&status(&lab), "later0").attached)).unwrap();
    assert!(!told(&status(&lab)));
    lab.net.ip(Who::Node, &["link", "delete", "later0"]).unwrap();
    until("later0 is told", WITHIN, || Ok(told(&status(&lab)))).unwrap();

    // Killed: the tier stays, as it was.
    let before = status(&lab);
    lab.daemon.take().unwrap().kill().unwrap();
    let stranger = lab.net.open(Who::Stranger).unwrap();
    let made = AtomicUsize::new(0);
    assert_eq!(knock(stranger, kubelet(false), 200, &made).unwrap(), 0);
    lab.start_daemon().unwrap().connected().unwrap();
    let after = status(&lab);
    assert_eq!(on(&after, "eth0").link_id, first.link_id, "the link is adopted");
    assert!(count(&after, "edge-no-selector") >= count(&before, "edge-no-selector") + 200, "counted meanwhile");
    assert_eq!(count(&after, "no-selector"), count(&before, "no-selector"));

    // Somebody takes the pin, then detaches the link.
    let pin = lab.pins().join("links/edge_xdp_eth0");
    let mended = after.mended;
    fs::remove_file(&pin).unwrap();
    until("the pin is mended", WITHIN, || Ok(pin.exists() && status(&lab).mended > mended)).unwrap();
    assert_eq!(on(&status(&lab), "eth0").link_id, first.link_id);
    let mended = status(&lab).mended;
    detach(&pin);
    until("the link is mended", WITHIN, || Ok(on(&status(&lab), "eth0").attached && status(&lab).mended > mended))
        .unwrap();
    assert_ne!(on(&status(&lab), "eth0").link_id, first.link_id, "a detached link cannot be attached again");

    // An edit that names it no more, and one that does again.
    lab.write_policy(POLICY).unwrap();
    until("the tier is removed", WITHIN, || Ok(status(&lab).edge.is_empty() && !pin.exists())).unwrap();
    let before = status(&lab);
    let stranger = lab.net.open(Who::Stranger).unwrap();
    assert_eq!(knock(stranger, kubelet(false), 50, &AtomicUsize::new(0)).unwrap(), 0, "the guard is still there");
    assert_eq!(count(&status(&lab), "edge-no-selector"), count(&before, "edge-no-selector"));
    lab.write_policy(&with_edge(POLICY, "eth0")).unwrap();
    until("the tier is back", WITHIN, || Ok(on(&status(&lab), "eth0").attached)).unwrap();

    // `unpin` takes it with the rest.
    lab.daemon().unwrap().process.stop().unwrap();
    let said = lab.daemon().unwrap().said("unpin", &[]).unwrap();
    assert_eq!(said.code, 0);
    assert_eq!(lab.healthz(Who::Stranger, false).unwrap(), Outcome::Http(200));
}

#[test]
fn a_build_of_another_abi_takes_the_tier_over() {
    let mut lab = Lab::new(&with_edge(POLICY, "eth0")).unwrap();
    let before = on(&lab.daemon().unwrap().status().unwrap(), "eth0");
    lab.daemon().unwrap().process.stop().unwrap();
    lab.setup.build = lab.setup.build.other();
    lab.start_daemon().unwrap().connected().unwrap();
    let after = on(&lab.daemon().unwrap().status().unwrap(), "eth0");
    assert!(
        after.attached && after.link_id == before.link_id && after.program_id != before.program_id,
        "{before:?} {after:?}"
    );
    assert_eq!(lab.healthz(Who::Stranger, false).unwrap(), Outcome::NoAnswer);
    assert_eq!(count(&lab.daemon().unwrap().status().unwrap(), "edge-no-selector"), 1);
}

#[test]
fn every_packet_of_a_flood_is_counted_at_the_edge() {
    let lab = Lab::new(&with_edge(POLICY, "eth0")).unwrap();
    lab.net.run(Who::Stranger, || Ok(flood::send(1))).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let daemon = lab.daemon.as_ref().unwrap();
    let before = daemon.status().unwrap();
    let sent = lab.net.run(Who::Stranger, || Ok(flood::send(flood::seconds()))).unwrap();
    let dropped = || count(&daemon.status().unwrap(), "edge-no-selector") - count(&before, "edge-no-selector");
    until("all have arrived", Duration::from_secs(5), || Ok(dropped() >= sent)).ok();
    println!("edge flood: {sent} SYNs sent, {} dropped and counted", dropped());
    assert_eq!(dropped(), sent);
    assert_eq!(
        count(&daemon.status().unwrap(), "no-selector"),
        count(&before, "no-selector"),
        "none came to the guard"
    );
}
