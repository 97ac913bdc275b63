//! Owns what a flood of strangers' SYNs costs, and what it leaves to an allowed client: the guard beside other guards of the same port.
//! Called by `main`.
//! Must never give a rival another flood, another client or another server than the guard has.
//!
//! One processor is the outside world: it floods, and runs the clients at a higher priority. The other one is the node: it runs the server,
//! and at a higher priority, as an interrupt would be, the one thread that does all work on arriving packets (`uplink`). The flood's pace is
//! below what the node can take, and the server works for each connection, so that the node limits the clients: they lose what drops cost.
//! The cost of a flood packet is measured apart, at full speed without clients: the thread's time divided by its packets. The guard judges
//! a listener in the guarded cgroup; its rivals, and nobody at all, stand before one of the same process in a cgroup beside it.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use lab::{
    bench::{Pairs, Row, median, progress},
    lab::Lab,
    net::Who,
    process::{Process, until},
    traffic::{OTHER_CPU, pin},
    wire::hardware,
};
use nix::unistd::Pid;

use crate::{
    Amount,
    generator::Generator,
    precedence,
    prefixes::{PORT, document, prefixes},
    rivals::Rival,
    undisturbed,
    uplink::Uplink,
    wire::{FREE_PORT, connection, lab_with},
};

/// How many prefixes everybody allows.
const PREFIXES: usize = 1_000;
/// How many connections the clients try to open at a time.
const CLIENTS: usize = 16;
/// What the server works for a connection: a fraction of what a TLS handshake takes it.
const WORK: Duration = Duration::from_micros(30);
/// From packet to packet beside the clients: 500,000 a second.
const PACE: Duration = Duration::from_nanos(2_000);

/// Who stands before the port, and its figures, round by round.
struct Subject {
    name: &'static str,
    kind: Kind,
    /// Connections of the allowed clients a second.
    allowed: Vec<f64>,
    /// Nanoseconds of processor time for a packet of the flood.
    packet: Vec<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The guard, with its edge tier on the uplink or without it.
    Guard {
        edge: bool,
    },
    Nobody,
    Rival(Rival),
}

impl Subject {
    fn new(name: &'static str, kind: Kind) -> Subject {
        Subject { name, kind, allowed: Vec::new(), packet: Vec::new() }
    }

    fn rival(&self) -> Option<Rival> {
        if let Kind::Rival(rival) = self.kind { Some(rival) } else { None }
    }

    fn port(&self) -> u16 {
        if matches!(self.kind, Kind::Guard { .. }) { PORT + 1 } else { FREE_PORT + 1 }
    }

    /// The first node, but for iptables: once it was there, every packet goes through its tables, be they empty.
    fn node<'a>(&self, [node, other]: &'a mut [Node; 2]) -> &'a mut Node {
        if self.rival() == Some(Rival::Ipset) { other } else { node }
    }

    /// Puts this one before the port, alone.
    fn place(&self, lab: &Lab, nets: &[IpNet]) -> Result<()> {
        let has_edge = self.kind == Kind::Guard { edge: true };
        let edge = if has_edge { "  edge: {interfaces: [eth0]}\n" } else { "" };
        lab.write_policy(&(document(nets) + edge))?;
        let daemon = lab.daemon.as_ref().context("no guard runs")?;
        until("the edge tier is where it should be", Duration::from_secs(15), || {
            let links = daemon.status()?.edge;
            let attached = links.iter().any(|link| link.attached && link.hook == "xdp");
            Ok(if has_edge { attached } else { links.is_empty() })
        })?;
        self.rival().map_or(Ok(()), |rival| lab.net.run(Who::Node, || rival.install(FREE_PORT + 1, nets)))
    }

    /// One turn: what a packet costs the node alone, then how many connections the clients open beside the flood, and how many were not
    /// answered in time.
    fn turn(&mut self, node: &mut Node, time: Duration) -> Result<()> {
        let Node { lab, uplink, generator, .. } = node;
        let (lab, address) = (&*lab, Who::Node.at(false, self.port()));
        let frame = generator.frame(lab.net.run(Who::Node, || hardware("eth0"))?.1, self.port());
        let mut flood = |pace, time| lab.net.run(Who::Stranger, || generator.flood(&frame, pace, time));
        let before = uplink.done(lab)?;
        flood(Duration::ZERO, time / 2)?;
        let after = uplink.done(lab)?;
        let cost = (after.nanoseconds - before.nanoseconds) as f64 / (after.packets - before.packets) as f64;
        let client = || {
            lab.net.run(Who::Peer, || {
                pin(OTHER_CPU)?;
                // Otherwise the flood takes the clients' processor.
                precedence(Pid::from_raw(0), 2)?;
                let (started, mut counts) = (Instant::now(), [0, 0]);
                while started.elapsed() < time {
                    counts[usize::from(!connection(address))] += 1;
                }
                Ok(counts)
            })
        };
        let (sent, counts) = thread::scope(|scope| {
            let flood = scope.spawn(move || flood(PACE, time + Duration::from_millis(200)));
            thread::sleep(Duration::from_millis(100));
            let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
            let counts = clients.into_iter().map(|client| client.join().ok().context("a client")?);
            let counts = counts.collect::<Result<Vec<[u64; 2]>>>()?;
            anyhow::Ok((flood.join().ok().context("the flood")??, counts))
        })?;
        let [answered, given_up] = [0, 1].map(|which| counts.iter().map(|counts| counts[which]).sum::<u64>());
        let (name, allowed) = (self.name, answered as f64 / time.as_secs_f64());
        progress(&format!(
            "  {name:<22} {allowed:>6.0} connections/s, {given_up} given up, beside {sent:>7.0} SYNs/s; {cost:>5.0} ns"
        ));
        self.allowed.push(allowed);
        self.packet.push(cost);
        Ok(())
    }
}

/// A node to flood.
struct Node {
    lab: Lab,
    _server: Process,
    uplink: Uplink,
    generator: Generator,
}

impl Node {
    fn start(nets: &[IpNet]) -> Result<Node> {
        let (lab, server) = lab_with(&document(nets), WORK)?;
        // Strangers are behind a gateway: the kernel's neighbour table, one for all namespaces, does not hold so many.
        lab.net.ip(Who::Node, &["route", "add", "10.0.16.0/20", "via", &Who::Stranger.v4().to_string()])?;
        let uplink = Uplink::of(&lab)?;
        let generator = lab.net.run_on_switch(Generator::new)?;
        Ok(Node { lab, _server: server, uplink, generator })
    }
}

pub(crate) fn measure(amount: Amount) -> Result<Vec<Row>> {
    let nets: Vec<IpNet> =
        IpNet::aggregate(&prefixes(false, PREFIXES, 1)).into_iter().chain(["10.0.8.0/24".parse()?]).collect();
    let mut nodes = [Node::start(&nets)?, Node::start(&nets)?];
    let mut subjects = vec![
        Subject::new("with the edge tier", Kind::Guard { edge: true }),
        Subject::new("without the edge tier", Kind::Guard { edge: false }),
        Subject::new("nobody", Kind::Nobody),
    ];
    for rival in Rival::ALL {
        let subject = Subject::new(rival.name(), Kind::Rival(rival));
        let net = &subject.node(&mut nodes).lab.net;
        match net.run(Who::Node, || rival.install(FREE_PORT + 1, &nets).and_then(|()| rival.remove())) {
            Ok(()) => subjects.push(subject),
            Err(error) => progress(&format!("not measured: {}: {error:#}", rival.name())),
        }
    }
    for round in 0..amount.rounds {
        progress(&format!("a flood of SYNs, round {}", round + 1));
        let first = round % subjects.len();
        subjects.rotate_left(first);
        for subject in &mut subjects {
            let node = subject.node(&mut nodes);
            subject.place(&node.lab, &nets)?;
            // This thread has the highest priority: otherwise the clients start when the flood is over.
            precedence(Pid::from_raw(0), 3)?;
            let measured = subject.turn(node, Duration::from_secs_f64(amount.seconds));
            undisturbed(false)?;
            if let Some(rival) = subject.rival() {
                node.lab.net.run(Who::Node, || rival.remove())?;
            }
            measured?;
        }
        subjects.rotate_right(first);
    }
    Ok(rows(&subjects))
}

fn rows(subjects: &[Subject]) -> Vec<Row> {
    let is_guard = |subject: &&Subject| matches!(subject.kind, Kind::Guard { .. });
    let (guards, others): (Vec<_>, Vec<_>) = subjects.iter().partition(is_guard);
    let rivals = others.iter().filter(|other| other.kind != Kind::Nobody);
    let best = rivals.max_by(|one, other| median(&one.allowed).total_cmp(&median(&other.allowed)));
    let best = best.map(|best| best.kind);
    let mut rows = Vec::new();
    for ours in guards {
        for other in &others {
            let goal = match ours.kind {
                Kind::Guard { edge: true } if other.kind != Kind::Nobody => Some(("at least", 1.0)),
                Kind::Guard { edge: false } if best == Some(other.kind) => Some(("at least", 0.85)),
                Kind::Guard { .. } | Kind::Nobody | Kind::Rival(_) => None,
            };
            let names = format!("{} | {}", ours.name, other.name);
            let connections = Pairs::of(&ours.allowed, &other.allowed);
            rows.push(connections.row(format!("SYN flood, connections of an allowed client: {names}"), "1/s", goal));
            let cost = Pairs::of(&ours.packet, &other.packet);
            rows.push(cost.row(format!("SYN flood, the node's CPU for a packet: {names}"), "ns", None));
        }
    }
    rows
}
