//! Owns what the guard costs traffic that it lets through: established connections, both ways and by requests, and new connections.
//! Called by `main`.
//! Must never compare two listeners that differ in anything but the guard: same process, same buffers, one made in the guarded cgroup and
//! one in a cgroup beside it, to which no program is attached.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use lab::{
    bench::{Pairs, Row, progress, round_of},
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
        let at = |port: u16| SocketAddr::new(Who::Node.v4().into(), port);
        let mut sides = [Conversation::open(at(PORT))?, Conversation::open(at(FREE_PORT))?];
        let mut buffer = vec![0; CHUNK];
        let goal = Some(("at least", 0.99));
        let mut rows = Vec::new();
        for (ask, count, scale, unit, what) in [
            (Ask::Put, 4 << 20, 1.0 / (1 << 20) as f64, "MiB/s", "established: throughput to the node, with | without"),
            (
                Ask::Get,
                4 << 20,
                1.0 / (1 << 20) as f64,
                "MiB/s",
                "established: throughput from the node, with | without",
            ),
            (Ask::Transact, 200, 1.0, "1/s", "established: requests and answers, with | without"),
        ] {
            progress(what);
            let mut pairs = Pairs::default();
            for round in 0..amount.rounds {
                let each = round_of(Duration::from_secs_f64(amount.seconds * 2.0), round, |side| {
                    Ok((
                        count as f64 * scale,
                        sides.get_mut(side).map_or(Ok(Duration::ZERO), |side| side.ask(ask, count, &mut buffer))?,
                    ))
                })?;
                pairs.add(each[0], each[1]);
            }
            rows.push(pairs.row(what, unit, goal));
        }
        let what = "new connections, with | without";
        progress(what);
        let mut pairs = Pairs::default();
        let slice = Duration::from_millis(10);
        for round in 0..amount.rounds {
            let each = round_of(Duration::from_secs_f64(amount.seconds * 2.0), round, |side| {
                let port = [PORT + 1, FREE_PORT + 1].get(side).copied().unwrap_or_default();
                let (started, mut count) = (Instant::now(), 0);
                while started.elapsed() < slice {
                    count += u32::from(connection(at(port)));
                }
                Ok((count.into(), started.elapsed()))
            })?;
            pairs.add(each[0], each[1]);
        }
        rows.push(pairs.row(what, "1/s", None));
        Ok(rows)
    })
}
