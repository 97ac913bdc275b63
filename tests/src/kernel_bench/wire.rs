//! Owns what the guard costs traffic that it lets through: established connections, both ways and by requests, and new connections.
//! Called by `main`.
//! Must never compare two servers that differ in anything but the guard: same namespace, same program, one in the guarded cgroup and
//! one beside it, to which no program is attached.

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use lab::{
    bench::{Pairs, Row, progress},
    lab::Lab,
    net::Who,
};

use crate::{
    Amount,
    prefixes::{PORT, document},
    traffic::{Ask, Conversation, OTHER_CPU, connections, pin, start},
    undisturbed,
};

/// Where the server without the guard listens.
pub(crate) const FREE_PORT: u16 = 20_250;

/// A lab with the guard, and both servers.
pub(crate) fn lab_with(text: &str, precedence: bool) -> Result<(Lab, [lab::process::Process; 2])> {
    let mut lab = Lab::bare()?;
    lab.write_policy(text)?;
    lab.start_daemon()?;
    let guarded = start(&lab, lab.guarded(), PORT, precedence)?;
    let free = start(&lab, &lab.guarded().with_file_name("elsewhere"), FREE_PORT, precedence)?;
    Ok((lab, [guarded, free]))
}

pub(crate) fn measure(amount: Amount) -> Result<Vec<Row>> {
    let (lab, _servers) = lab_with(&document(&["10.0.8.0/24".parse()?]), true)?;
    lab.net.run(Who::Peer, || {
        pin(OTHER_CPU)?;
        undisturbed(true)?;
        let at = |port: u16| SocketAddr::new(Who::Node.v4().into(), port);
        let mut sides = [Conversation::open(at(PORT))?, Conversation::open(at(FREE_PORT))?];
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
                let each = round_of(amount, round, |side| {
                    Ok((
                        count as f64 * scale,
                        sides.get_mut(side).map_or(Ok(Duration::ZERO), |side| side.ask(ask, count))?,
                    ))
                })?;
                pairs.add(each[0], each[1]);
            }
            rows.push(pairs.row(what, unit, goal));
        }
        let what = "new connections, with | without";
        progress(what);
        let mut pairs = Pairs::default();
        let slice = Duration::from_millis(50);
        for round in 0..amount.rounds {
            let each = round_of(amount, round, |side| {
                let port = [PORT + 1, FREE_PORT + 1].get(side).copied().unwrap_or_default();
                Ok((connections(at(port), slice)? as f64, slice))
            })?;
            pairs.add(each[0], each[1]);
        }
        rows.push(pairs.row(what, "1/s", None));
        Ok(rows)
    })
}

/// A round: short turns of both sides, so that what happens elsewhere on the machine meets both alike. How much of each a second.
fn round_of(amount: Amount, round: usize, mut turn: impl FnMut(usize) -> Result<(f64, Duration)>) -> Result<[f64; 2]> {
    let (mut done, mut took) = ([0.0; 2], [0.0; 2]);
    for number in 0_usize.. {
        for side in if (round + number).is_multiple_of(2) { [0, 1] } else { [1, 0] } {
            let (more, time) = turn(side)?;
            done[side] += more;
            took[side] += time.as_secs_f64();
        }
        if took.iter().sum::<f64>() > amount.seconds * 2.0 {
            break;
        }
    }
    Ok([done[0] / took[0], done[1] / took[1]])
}
