//! Owns the tunnel bench: this agent and the upstream one under the same real proxy-server in one run, in turns; medians and ratios.
//! Called by `cargo xtask bench tunnel`, which shows the rows that this prints as JSON.
//! Must never compare figures of different runs.

mod null;
mod throughput;

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, bail};
use lab::{
    bare::{Place, Who, agent, memory, runtime, server},
    bench::{self, Goal, Pairs, Row, in_turn, print_line, progress},
    load::{self, Latency, Load, latency, request},
    net::without_pacing,
    process::Process,
    servers::{
        eventually,
        proxy_server::{AGENT_PORT, ProxyServer},
    },
};

/// How much is done.
#[derive(Clone, Copy)]
struct Amount {
    rounds: usize,
    /// Turns of each side in a round of throughput, and how much is moved in one.
    turns: usize,
    mib: usize,
    seconds: u64,
    /// Beside an endpoint that never reads, and without one.
    beside: u64,
    /// Dials of each side, and how many of them in one turn: what disturbs the machine for a moment meets both.
    dials: usize,
    dials_in_turn: usize,
    /// Dials of each side and round by 32 at once.
    dials_at_once: usize,
    idle: usize,
}

const FULL: Amount = Amount {
    rounds: 9,
    turns: 6,
    mib: 64,
    seconds: 3,
    beside: 10,
    dials: 10_000,
    dials_in_turn: 10,
    dials_at_once: 1000,
    idle: 10_000,
};
const QUICK: Amount = Amount { rounds: 1, turns: 4, beside: 6, dials: 1000, dials_at_once: 320, idle: 2000, ..FULL };

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["endpoint", address] => runtime()?.block_on(async {
            load::serve(address).await?;
            print_line("ready")?;
            std::future::pending().await
        }),
        ["null", server, certs] => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(null::serve(server.parse()?, certs.as_ref()))
        }
        [] => run(FULL, None),
        ["--quick"] => run(QUICK, None),
        ["--only", part] => run(FULL, Some(part)),
        ["--quick", "--only", part] => run(QUICK, Some(part)),
        _ => bail!(
            "usage: nodeguard-tunnel-bench [--quick] [--only memory|single|throughput|dials|requests|stalled|own]"
        ),
    }
}

fn run(amount: Amount, only: Option<&str>) -> Result<()> {
    let rows = Place::with(&[Who::Theirs.address()], async |place| {
        progress(&format!("TCP's congestion control: {}", without_pacing()?));
        let log = place.directory.join("endpoint.log");
        let _endpoint = Process::start_ready("endpoint", again(&["endpoint", "0.0.0.0:7000"])?, &log)?;
        let mut rows = Vec::new();
        if only != Some("own") {
            rows.extend(with_server(place, amount, only).await?);
        }
        if only.is_none_or(|only| only == "own") {
            rows.extend(throughput::without_server(place, amount).await?);
        }
        Ok(rows)
    })?;
    bench::print(&rows)
}

/// This program again, as another part of the bench.
fn again(words: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(words);
    Ok(command)
}

/// An agent under load, and where its load goes.
struct Subject {
    process: Process,
    load: Load,
}

/// Everything that the real server lets us see, or a part of it.
async fn with_server(place: &Place, amount: Amount, only: Option<&str>) -> Result<Vec<Row>> {
    let wanted = |part: &str| only.is_none_or(|only| only == part);
    let server = server(place)?;
    let mut rows = Vec::new();
    if wanted("memory") {
        rows.extend(memory_rows(place, &server, amount).await?);
    }
    let subjects = [subject(Who::Ours, place, &server).await?, subject(Who::Theirs, place, &server).await?];
    let null = ready(null::start(place)?, null::ADDRESS, &server).await?;
    let [ours, theirs] = &subjects;
    let all = [ours, theirs, &null];
    if wanted("throughput") || wanted("single") {
        rows.extend(throughput::measure(all, &server.process, amount, only == Some("single")).await?);
    }
    if wanted("requests") || wanted("dials") {
        rows.extend(dial_rows(all, amount).await?);
    }
    if wanted("requests") {
        rows.extend(request_rows(&subjects, amount).await?);
    }
    if wanted("stalled") {
        progress("beside an endpoint that never reads");
        rows.extend(stalled_rows(&subjects, amount).await?);
    }
    let [ours, theirs] = subjects.map(|subject| memory(subject.process.id(), "VmHWM"));
    rows.push(Row::beside("most memory in all of this", "MiB", ours? / 1024.0, theirs? / 1024.0, None));
    Ok(rows)
}

/// Dials under the real server.
async fn dial_rows(all: [&Subject; 3], amount: Amount) -> Result<Vec<Row>> {
    progress("dial");
    let [ours, theirs, null] = latencies(amount, async |side, count| all[side].load.dials(count).await).await?;
    Ok(vec![
        Row::beside("dial, p50", "ms", ours.p50, theirs.p50, None),
        Row::beside("dial, p99", "ms", ours.p99, theirs.p99, DIAL_GOAL),
        Row::beside("dial, p99: an agent without endpoints", "ms", null.p99, theirs.p99, None),
    ])
}

/// What a dial has to take of the upstream agent's time, one in a hundred not counted.
const DIAL_GOAL: Goal = Some(("at most", 0.6));

/// Dials one after the other, in turns of each side. The latencies are of all turns together: a turn has too few for a p99.
async fn latencies<const N: usize>(
    amount: Amount,
    dials: impl AsyncFn(usize, usize) -> Result<Vec<Duration>>,
) -> Result<[Latency; N]> {
    let mut took = [const { Vec::new() }; N];
    for turn in 0..amount.dials / amount.dials_in_turn {
        for side in in_turn::<N>(turn) {
            took[side].extend(dials(side, amount.dials_in_turn).await?);
        }
    }
    Ok(took.map(latency))
}

/// Small requests, and dials at once.
async fn request_rows(subjects: &[Subject; 2], amount: Amount) -> Result<Vec<Row>> {
    progress("requests and dials at once");
    let mut figures: [Pairs; 3] = Default::default();
    for round in 0..amount.rounds {
        for side in in_turn::<2>(round) {
            let load = &subjects[side].load;
            let requests = load.requests(8, Duration::from_secs(amount.seconds)).await?;
            let rate = load.dial_rate(amount.dials_at_once).await?;
            for (pairs, value) in figures.iter_mut().zip([requests.p50, requests.p99, rate]) {
                pairs.push(side, value);
            }
        }
    }
    let [p50, p99, rate] = figures;
    Ok(vec![
        p50.row("request and answer, p50, 8 connections", "ms", None),
        p99.row("request and answer, p99, 8 connections", "ms", None),
        rate.row("dials by 32 at once", "1/s", None),
    ])
}

/// Each agent against itself: with and without an endpoint that never reads, in turns.
async fn stalled_rows(subjects: &[Subject; 2], amount: Amount) -> Result<Vec<Row>> {
    let time = Duration::from_secs(amount.beside);
    let mut rows = Vec::new();
    // The upstream agent does not come back from the first time.
    let [ours, theirs] = subjects;
    let goals = (Some(("at least", 0.9)), Some(("at most", 2.0)));
    for (name, subject, rounds, (least, most)) in
        [("ours", ours, amount.rounds, goals), ("Go agent", theirs, 1, (None, None))]
    {
        let [mut throughput, mut p99]: [Pairs; 2] = Default::default();
        for round in 0..rounds {
            // Side 0 is beside an endpoint that never reads, side 1 without one, which is first in the first round.
            for side in in_turn::<2>(round + 1) {
                let beside = subject.load.beside(side == 0, time).await?;
                throughput.push(side, beside.throughput);
                p99.push(side, beside.latency.p99);
            }
        }
        rows.push(throughput.row(format!("{name}: throughput of the others, stalled | not"), "MiB/s", least));
        rows.push(p99.row(format!("{name}: p99 of the others, stalled | not"), "ms", most));
    }
    Ok(rows)
}

/// Fresh agents: their memory at rest, and with many connections that rest.
async fn memory_rows(place: &Place, server: &ProxyServer, amount: Amount) -> Result<Vec<Row>> {
    let [mut idle, mut each, mut later]: [Pairs; 3] = Default::default();
    for (side, who) in Who::BOTH.into_iter().enumerate() {
        progress(&format!("memory with {} idle connections: {who:?}", amount.idle));
        let subject = subject(who, place, server).await?;
        let resident = async |wait: u64| {
            tokio::time::sleep(Duration::from_secs(wait)).await;
            memory(subject.process.id(), "VmRSS")
        };
        let before = resident(1).await?;
        let mut open = subject.load.connect_all(amount.idle).await?;
        for stream in &mut open {
            request(stream).await?;
        }
        let after = resident(2).await?;
        drop(open);
        idle.push(side, before / 1024.0);
        each.push(side, (after - before) / amount.idle as f64);
        later.push(side, resident(10).await? / 1024.0);
    }
    Ok(vec![
        idle.row("memory at rest", "MiB", Some(("at most", 0.25))),
        each.row(format!("memory per idle connection, of {}", amount.idle), "KiB", Some(("at most", 1.0))),
        // At its start the agent gives back code; after work it has again what it needs of it.
        later.row("memory at rest, 10 s after these were closed", "MiB", Some(("at most", 0.25))),
    ])
}

/// Starts an agent and waits until a dial comes through it.
async fn subject(who: Who, place: &Place, server: &ProxyServer) -> Result<Subject> {
    ready(agent(who, place, AGENT_PORT)?, who.address(), server).await
}

/// Waits until a dial comes through an agent.
async fn ready(mut process: Process, address: &str, server: &ProxyServer) -> Result<Subject> {
    let load = server.load_at(address);
    let dialled = eventually(address, Duration::from_secs(20), async || {
        process.check()?;
        Ok(load.connect().await.is_ok())
    });
    dialled.await.with_context(|| format!("no dial comes through\n{}", process.printed()))?;
    Ok(Subject { process, load })
}
