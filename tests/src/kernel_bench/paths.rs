//! Owns the cost of a verdict, by test run: each path through the guard beside a floor that does only the look-ups it cannot do without.
//! Called by `main`.
//! Must never call a floor what another design with the same tables could do cheaper.
//!
//! Both sides run the same packet with the same tables, and the run of an empty program is subtracted. The floor looks up the generation, the
//! port, the pinhole, the peer and one counter, and reads the addresses at fixed offsets: no header checks, no scope, no audit, no event.
//! The guard's side is all of `decide` and all of `report`, for a denial with the clock and the rate limit of events. The first run reports
//! the event, so that the repeated ones measure a denial in a flood. Twelve sources take turns, so that no figure is one lucky path of a trie.
//! A test run's socket is a dummy in state CLOSE: `early exit` is the whole program up to there, one helper call more than for an established one.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{Array, MapData},
    programs::{CgroupSkb, TestRun, TestRunOptions},
};
use guard_common::{
    abi::{Pinhole, Probe},
    packet::TCP,
};
use ipnet::IpNet;
use lab::{
    agree::load,
    bench::{Goal, Pairs, Row, in_turn, progress},
    net::Who,
    packets::{Flow, ethernet, ip, syn},
};
use nodeguard::kernel::{
    pinholes::OpenPinholes,
    tables::{apply::Apply, ruleset_maps::RulesetMaps},
};

use crate::{
    Amount, object,
    prefixes::{PORT, SIZES, compiled, document, inside, outside, prefixes},
};

const PROGRAMS: [&str; 6] =
    ["guard_ingress", "bench_empty", "bench_guard", "bench_floor_port", "bench_floor_pinhole", "bench_floor_peer"];
/// Sources that take turns.
const SOURCES: usize = 12;
/// A port that no rule names.
const OTHER_PORT: u16 = 10_300;

/// The programs on tables with so many prefixes of each family.
struct Bench {
    ebpf: Ebpf,
    probe: Array<MapData, Probe>,
    pinholes: OpenPinholes,
    amount: Amount,
}

pub(crate) fn measure(amount: Amount) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut denials: Vec<(usize, [f64; 2])> = Vec::new();
    for size in SIZES {
        progress(&format!("verdicts at {size} prefixes"));
        let nets = [prefixes(false, size, 1), prefixes(true, size, 1)];
        let mut bench = Bench::new(&nets, amount)?;
        let (v4, v6) = (inside(&nets[0], SOURCES), inside(&nets[1], SOURCES));
        let strangers = [outside(&nets[0], false, SOURCES), outside(&nets[1], true, SOURCES)];
        if size == 1 {
            rows.push(bench.early_exit(&v4)?);
            rows.push(bench.row("port not guarded", &strangers[0], OTHER_PORT, "bench_floor_port", 1, None)?);
        }
        let goal = Some(("at most", 1.5));
        bench.open(&strangers[0])?;
        let name = |what: &str| format!("{what}, {size} CIDRs");
        rows.push(bench.row(name("allowed by pinhole"), &strangers[0], PORT, "bench_floor_pinhole", 1, goal)?);
        bench.close(&strangers[0])?;
        rows.push(bench.row(name("allowed by CIDR, IPv4"), &v4, PORT, "bench_floor_peer", 1, goal)?);
        rows.push(bench.row(name("allowed by CIDR, IPv6"), &v6, PORT, "bench_floor_peer", 1, goal)?);
        let mut denied = [0.0; 2];
        for ((family, sources), denied) in ["IPv4", "IPv6"].iter().zip(&strangers).zip(&mut denied) {
            let row =
                bench.row(name(&format!("denied by no rule, {family}")), sources, PORT, "bench_floor_peer", 0, goal)?;
            *denied = row.ours;
            rows.push(row);
        }
        denials.push((size, denied));
    }
    let at = |size: usize| denials.iter().find(|(of, _)| *of == size).map_or([f64::NAN; 2], |(_, denied)| *denied);
    for ((family, one), many) in ["IPv4", "IPv6"].iter().zip(at(1)).zip(at(10_000)) {
        let what = format!("denied by no rule, {family}: 10,000 CIDRs | one");
        rows.push(Row::beside(what, "ns", many, one, Some(("at most", 2.5))));
    }
    Ok(rows)
}

impl Bench {
    fn new(nets: &[Vec<IpNet>; 2], amount: Amount) -> Result<Bench> {
        let mut ebpf = load(&object()?);
        for name in PROGRAMS {
            let program: &mut CgroupSkb = ebpf.program_mut(name).context(name)?.try_into()?;
            program.load().with_context(|| name.to_owned())?;
        }
        let probe = Array::try_from(ebpf.take_map("PROBE").context("PROBE")?)?;
        let pinholes = OpenPinholes::take(&mut ebpf)?;
        let mut apply = Apply::new(RulesetMaps::take(&mut ebpf)?)?;
        apply.apply(&Arc::new(compiled(document(nets.iter().flatten()))?))?;
        Ok(Bench { ebpf, probe, pinholes, amount })
    }

    fn open(&mut self, sources: &[IpAddr]) -> Result<()> {
        sources
            .iter()
            .try_for_each(|source| Ok(self.pinholes.insert(flow(*source).key(), Pinhole::of(Pinhole::TUNNEL))?))
    }

    fn close(&mut self, sources: &[IpAddr]) -> Result<()> {
        sources.iter().try_for_each(|source| Ok(self.pinholes.remove(&flow(*source).key())?))
    }

    fn early_exit(&mut self, sources: &[IpAddr]) -> Result<Row> {
        let mut pairs = Pairs::default();
        for _ in 0..self.amount.rounds {
            let (mut guard, mut empty) = (0.0, 0.0);
            for source in sources {
                let frame = frame(*source);
                empty += self.run("bench_empty", &frame, 1)?;
                guard += self.run("guard_ingress", &frame, 1)?;
            }
            pairs.add([guard, empty].map(|sum: f64| sum / SOURCES as f64));
        }
        Ok(pairs.row("early exit | empty program, both gross", "ns", None))
    }

    /// The guard's cost beside the floor's, both net of the empty program.
    fn row(
        &mut self,
        what: impl Into<String>,
        sources: &[IpAddr],
        port: u16,
        floor: &str,
        verdict: u32,
        goal: Goal,
    ) -> Result<Row> {
        self.probe.set(0, Probe { port, protocol: 6, ..Probe::default() }, 0)?;
        let frames: Vec<Vec<u8>> = sources.iter().copied().map(frame).collect();
        let mut pairs = Pairs::default();
        for round in 0..self.amount.rounds {
            let mut sums = [0.0; 2];
            for (turn, frame) in frames.iter().enumerate() {
                let empty = self.run("bench_empty", frame, 1)?;
                for side in in_turn::<2>(round + turn) {
                    sums[side] += self.run(["bench_guard", floor][side], frame, verdict)? - empty;
                }
            }
            pairs.add(sums.map(|sum| sum / SOURCES as f64));
        }
        Ok(pairs.row(what, "ns", goal))
    }

    /// Nanoseconds of one run; the best of three series, as an interrupt lengthens one and nothing shortens it.
    fn run(&mut self, name: &str, frame: &[u8], verdict: u32) -> Result<f64> {
        let program: &mut CgroupSkb = self.ebpf.program_mut(name).context("a program")?.try_into()?;
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let repeat = self.amount.repeat / 3;
            let result = program.test_run(TestRunOptions { data_in: Some(frame), repeat, ..TestRunOptions::new() })?;
            anyhow::ensure!(result.return_value == verdict, "{name} said {}", result.return_value);
            best = best.min(result.duration.as_nanos() as f64);
        }
        Ok(best)
    }
}

fn flow(source: IpAddr) -> Flow {
    Flow { from: SocketAddr::new(source, 40_000), to: Who::Node.at(source.is_ipv6(), PORT) }
}

/// A SYN from a source to the node, as a test run takes it: behind an Ethernet header.
fn frame(source: IpAddr) -> Vec<u8> {
    let flow = flow(source);
    ethernet([0; 6], [0; 6], &ip(flow, TCP, &syn(flow, 1)))
}
