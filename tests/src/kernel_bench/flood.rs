//! Owns what a flood of strangers' SYNs costs, and what it leaves to an allowed client: the guard beside other guards of the same port.
//! Called by `main`.
//! Must never give a rival another flood, another client or another server than the guard has.
//!
//! One processor is the outside world: it floods as fast as it can and runs the client. The other one is the node: it runs the server and
//! the one thread that does all work on arriving packets (`uplink`). So what a drop costs is what the allowed client does not get; the
//! time of that thread, divided by the packets it took, is what a packet of the flood costs. The guard judges a server in the guarded
//! cgroup; its rivals, and nobody at all, stand before the same server in a cgroup beside it.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Context, Result};
use ipnet::IpNet;
use lab::{
    bench::{Pairs, Row, median, progress},
    lab::Lab,
    net::Who,
    process::until,
};
use nodeguard::edge::EdgeLink;

use crate::{
    Amount,
    generator::{flood, hardware_address},
    prefixes::{PORT, document, prefixes},
    rivals::Rival,
    traffic::{OTHER_CPU, connections, pin},
    undisturbed,
    uplink::Uplink,
    wire::{FREE_PORT, lab_with},
};

/// How many prefixes everybody allows.
const PREFIXES: usize = 1_000;
/// How many connections the client tries to open at a time.
const CLIENTS: usize = 8;

/// Who stands before the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    /// The guard with its edge tier on the uplink.
    Edge,
    /// The guard without it.
    Guard,
    Nobody,
    Rival(Rival),
}

/// A subject's figures, round by round.
struct Figures {
    subject: Subject,
    /// Connections of the client a second.
    allowed: Vec<f64>,
    /// Nanoseconds of processor time for a packet of the flood.
    packet: Vec<f64>,
}

impl Subject {
    fn name(self) -> &'static str {
        match self {
            Subject::Edge => "with the edge tier",
            Subject::Guard => "without the edge tier",
            Subject::Nobody => "nobody",
            Subject::Rival(rival) => rival.name(),
        }
    }
}

pub(crate) fn measure(amount: Amount) -> Result<Vec<Row>> {
    let nets: Vec<IpNet> =
        IpNet::aggregate(&prefixes(false, PREFIXES, 1)).into_iter().chain(["10.0.8.0/24".parse()?]).collect();
    let (lab, _servers) = lab_with(&document(&nets), false)?;
    let uplink = Uplink::of(&lab)?;
    let mut subjects = vec![Subject::Edge, Subject::Guard, Subject::Nobody];
    for rival in Rival::ALL {
        match lab.net.run(Who::Node, || rival.install(FREE_PORT + 1, &nets).and_then(|()| rival.remove())) {
            Ok(()) => subjects.push(Subject::Rival(rival)),
            Err(error) => progress(&format!("not measured: {}: {error:#}", rival.name())),
        }
    }
    let mut all: Vec<Figures> =
        subjects.iter().map(|subject| Figures { subject: *subject, allowed: Vec::new(), packet: Vec::new() }).collect();
    for round in 0..amount.rounds.min(6) {
        progress(&format!("a flood of SYNs, round {}", round + 1));
        let first = round % all.len();
        all.rotate_left(first);
        for figures in &mut all {
            let subject = figures.subject;
            place(&lab, subject, &nets)?;
            let measured = one(&lab, &uplink, subject, Duration::from_secs_f64(amount.seconds * 2.0));
            if let Subject::Rival(rival) = subject {
                lab.net.run(Who::Node, || rival.remove())?;
            }
            let (allowed, packet, rate) = measured?;
            let name = subject.name();
            progress(&format!("  {name:<22} {allowed:>7.0} connections/s, {rate:>8.0} packets/s at {packet:.0} ns"));
            figures.allowed.push(allowed);
            figures.packet.push(packet);
        }
        all.rotate_right(first);
    }
    Ok(rows(&all))
}

/// Puts somebody before the port, alone.
fn place(lab: &Lab, subject: Subject, nets: &[IpNet]) -> Result<()> {
    let edge = if subject == Subject::Edge { "  edge: {interfaces: [eth0]}\n" } else { "" };
    lab.write_policy(&(document(nets) + edge))?;
    let daemon = lab.daemon.as_ref().context("no guard runs")?;
    until("the edge tier is where it should be", Duration::from_secs(15), || {
        let status = daemon.status()?;
        let attached = |link: &EdgeLink| link.attached && link.hook == "xdp";
        Ok(if edge.is_empty() { status.edge.is_empty() } else { status.edge.iter().any(attached) })
    })?;
    match subject {
        Subject::Rival(rival) => lab.net.run(Who::Node, || rival.install(FREE_PORT + 1, nets)),
        Subject::Edge | Subject::Guard | Subject::Nobody => Ok(()),
    }
}

/// Connections a second beside the flood, what a packet of it costs the node, and how many a second the node took.
fn one(lab: &Lab, uplink: &Uplink, subject: Subject, time: Duration) -> Result<(f64, f64, f64)> {
    let port = match subject {
        Subject::Edge | Subject::Guard => PORT + 1,
        Subject::Nobody | Subject::Rival(_) => FREE_PORT + 1,
    };
    let to = lab.net.run(Who::Node, || hardware_address("eth0"))?;
    let before = uplink.done(lab)?;
    lab.net.run(Who::Stranger, || flood(to, port, time / 2))?;
    let after = uplink.done(lab)?;
    let packets = after.packets.saturating_sub(before.packets) as f64;
    let cost = after.nanoseconds.saturating_sub(before.nanoseconds) as f64 / packets;
    let address = SocketAddr::new(Who::Node.v4().into(), port);
    let count = thread::scope(|scope| -> Result<u64> {
        let flood = scope.spawn(|| lab.net.run(Who::Stranger, || flood(to, port, time + Duration::from_millis(200))));
        thread::sleep(Duration::from_millis(100));
        let client = || {
            lab.net.run(Who::Peer, || {
                pin(OTHER_CPU)?;
                // Else the flood and the scheduler decide how much of their processor the clients have.
                undisturbed(true)?;
                connections(address, time)
            })
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        let mut count = 0;
        for client in clients {
            count += client.join().ok().context("a client")??;
        }
        flood.join().ok().context("the flood")??;
        Ok(count)
    })?;
    Ok((count as f64 / time.as_secs_f64(), cost, packets / (time / 2).as_secs_f64()))
}

fn rows(all: &[Figures]) -> Vec<Row> {
    let best = all
        .iter()
        .filter(|figures| matches!(figures.subject, Subject::Rival(_)))
        .max_by(|one, other| median(&one.allowed).total_cmp(&median(&other.allowed)))
        .map(|figures| figures.subject);
    let mut rows = Vec::new();
    for ours in all.iter().filter(|figures| matches!(figures.subject, Subject::Edge | Subject::Guard)) {
        for other in all.iter().filter(|figures| matches!(figures.subject, Subject::Nobody | Subject::Rival(_))) {
            let goal = match (ours.subject, other.subject) {
                (Subject::Edge, Subject::Rival(_)) => Some(("at least", 1.0)),
                (Subject::Guard, _) if best == Some(other.subject) => Some(("at least", 0.85)),
                (Subject::Edge | Subject::Guard | Subject::Nobody | Subject::Rival(_), _) => None,
            };
            let pairs = |of: fn(&Figures) -> &Vec<f64>| {
                let mut pairs = Pairs::default();
                of(ours).iter().zip(of(other)).for_each(|(ours, other)| pairs.add(*ours, *other));
                pairs
            };
            let names = format!("{} | {}", ours.subject.name(), other.subject.name());
            let connections = pairs(|figures| &figures.allowed);
            rows.push(connections.row(format!("SYN flood, connections of an allowed client: {names}"), "1/s", goal));
            let cost = pairs(|figures| &figures.packet);
            rows.push(cost.row(format!("SYN flood, the node's CPU for a packet: {names}"), "ns", None));
        }
    }
    rows
}
