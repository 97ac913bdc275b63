//! Owns what the guard costs traffic that it lets through: established connections, both ways and by requests, and new connections.
//! Called by `main`.
//! Must never compare listeners that differ in more than the guard: same process and buffers, one in the guarded cgroup, one beside it.

use std::time::{Duration, Instant};

use anyhow::Result;
use lab::{
    bench::{Goal, Pairs, Row, progress, round_of},
    lab::Lab,
    net::Who,
    process::Process,
};

use crate::{
    Amount,
    prefixes::{PORT, document},
    traffic::{Ask, CHUNK, Conversation, OTHER_CPU, connection, pin, start},
    undisturbed,
};

/// The listener without the guard.
pub(crate) const FREE_PORT: u16 = 20_250;
/// How long new connections are opened in a turn.
const SLICE: Duration = Duration::from_millis(10);
const MIB: usize = 1 << 20;

/// A lab with the guard, and the server, which works so long for each new connection.
pub(crate) fn lab_with(text: &str, work: Duration) -> Result<(Lab, Process)> {
    let mut lab = Lab::bare()?;
    lab.write_policy(text)?;
    lab.start_daemon()?;
    let server = start(&lab, [PORT, FREE_PORT], work)?;
    Ok((lab, server))
}

pub(crate) fn measure(amount: Amount) -> Result<Vec<Row>> {
    let (lab, _server) = lab_with(&document(&["10.0.8.0/24".parse()?]), Duration::ZERO)?;
    lab.net.run(Who::Peer, || {
        pin(OTHER_CPU)?;
        undisturbed(true)?;
        let [guarded, free] = [PORT, FREE_PORT].map(|port| Who::Node.at(false, port));
        let mut sides = [Conversation::open(guarded)?, Conversation::open(free)?];
        let mut buffer = vec![0; CHUNK];
        let goal = Some(("at least", 0.99));
        let mut rows = Vec::new();
        for (ask, count, one, unit, what) in [
            (Ask::Put, 4 * MIB, MIB, "MiB/s", "established: throughput to the node"),
            (Ask::Get, 4 * MIB, MIB, "MiB/s", "established: throughput from the node"),
            (Ask::Transact, 200, 1, "1/s", "established: requests and answers"),
        ] {
            rows.push(rounds(amount, what, unit, goal, |side| {
                Ok(((count / one) as f64, sides[side].ask(ask, count, &mut buffer)?))
            })?);
        }
        rows.push(rounds(amount, "new connections", "1/s", None, |side| {
            let at = Who::Node.at(false, [PORT, FREE_PORT][side] + 1);
            let (started, mut count) = (Instant::now(), 0);
            while started.elapsed() < SLICE {
                count += u32::from(connection(at));
            }
            Ok((count.into(), started.elapsed()))
        })?);
        Ok(rows)
    })
}

/// Both sides, with the guard and without, in turns that say how much they did in what time.
fn rounds(
    amount: Amount,
    what: &str,
    unit: &'static str,
    goal: Goal,
    mut turn: impl FnMut(usize) -> Result<(f64, Duration)>,
) -> Result<Row> {
    let what = format!("{what}, with | without");
    progress(&what);
    let mut pairs = Pairs::default();
    for round in 0..amount.rounds {
        let [ours, other] = round_of(Duration::from_secs_f64(amount.seconds * 2.0), round, &mut turn)?;
        pairs.add(ours, other);
    }
    Ok(pairs.row(what, unit, goal))
}
