//! Owns the measurements without the real server, which is what limits: the agents under a server in Rust, in the same process as the load.
//! Called by `main` after the measurements with the real server.
//! Must never give one agent a server, an endpoint or a turn that the other does not get.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use lab::{
    bare::{Place, SERVER, Who, agent, cpu, cpu_of},
    bench::{Pairs, Row, median, progress},
    fake::{Connection, Dials, Fake, Manners},
    load::{Way, latency},
    process::Process,
};

use crate::{Amount, both, throughput::GOAL};

const PORT: u16 = 8191;
/// As much as the real server sends in one message.
const CHUNK: usize = 32 << 10;

/// An agent under the server in Rust.
struct Side {
    process: Process,
    dials: Dials,
    address: String,
}

/// One connection both ways, and dials.
pub(crate) async fn without_server(place: &Place, amount: Amount) -> Result<Vec<Row>> {
    let mut fake = Fake::start(format!("{SERVER}:{PORT}").parse()?, &place.certs, Manners::default()).await?;
    let mut sides = Vec::new();
    for who in Who::BOTH {
        let process = agent(who, place, PORT)?;
        let stream = tokio::time::timeout(Duration::from_secs(10), fake.agent()).await.context("no agent came")??;
        sides.push(Side { process, dials: Dials::new(stream), address: format!("{}:7000", who.address()) });
    }
    let mut rows = Vec::new();
    for (way, there) in [(Way::ToControlPlane, "to the control plane"), (Way::ToNode, "to the node")] {
        progress(&format!("server in Rust: throughput {there}"));
        rows.extend(throughput(&sides, amount, way, there).await?);
    }
    progress("server in Rust: dials");
    rows.extend(dials(&sides, amount).await?);
    Ok(rows)
}

async fn throughput(sides: &[Side], amount: Amount, way: Way, there: &str) -> Result<Vec<Row>> {
    let [mut speed, mut work, mut server]: [Pairs; 3] = Default::default();
    for round in 0..amount.rounds {
        let mut open = Vec::new();
        for side in sides {
            open.push(side.dials.dial(&side.address).await?);
        }
        let (mut speeds, mut spent, mut served): ([Vec<f64>; 2], [f64; 2], [f64; 2]) = Default::default();
        for turn in 0..amount.turns {
            for which in both(round + turn) {
                let (side, connection) = (sides.get(which).context("two")?, open.get_mut(which).context("two")?);
                let (before, own, started) = (cpu(&side.process)?, cpu_of(std::process::id())?, Instant::now());
                transfer(connection, way, amount.mib << 20).await?;
                speeds[which].push(amount.mib as f64 / started.elapsed().as_secs_f64());
                spent[which] += cpu(&side.process)? - before;
                served[which] += cpu_of(std::process::id())? - own;
            }
        }
        let per_gib = |seconds: f64| seconds * 1024.0 / (amount.mib * amount.turns) as f64;
        speed.add(median(&speeds[0]), median(&speeds[1]));
        work.add(per_gib(spent[0]), per_gib(spent[1]));
        server.add(per_gib(served[0]), per_gib(served[1]));
        for connection in open {
            connection.close().await?;
        }
    }
    Ok(vec![
        speed.row(format!("server in Rust: throughput {there}, 1 connection"), "MiB/s", Some(("at least", GOAL))),
        work.row(format!("server in Rust: CPU {there}, 1 connection"), "s/GiB", None),
        server.row(format!("server in Rust: its own CPU and the load's, {there}"), "s/GiB", None),
    ])
}

async fn transfer(connection: &mut Connection, way: Way, bytes: usize) -> Result<()> {
    match way {
        Way::ToControlPlane => {
            connection.send(Bytes::from(format!("SOURCE {bytes}\n"))).await?;
            let mut left = bytes;
            while left > 0 {
                left -= connection.receive().await.context("closed too early")?.len();
            }
        }
        Way::ToNode => {
            let chunk = Bytes::from(vec![0; CHUNK]);
            connection.send(Bytes::from(format!("SINK {bytes}\n"))).await?;
            for _ in 0..bytes / CHUNK {
                connection.send(chunk.clone()).await?;
            }
            connection.receive().await.context("closed too early")?;
        }
    }
    Ok(())
}

/// Dials one after the other.
async fn dials(sides: &[Side], amount: Amount) -> Result<Vec<Row>> {
    let mut took: [Vec<Duration>; 2] = Default::default();
    for turn in 0..amount.dials / amount.dials_in_turn {
        for which in both(turn) {
            let side = sides.get(which).context("two")?;
            for _ in 0..amount.dials_in_turn {
                let started = Instant::now();
                let connection = side.dials.dial(&side.address).await?;
                took[which].push(started.elapsed());
                connection.close().await?;
            }
        }
    }
    let [ours, theirs] = took.map(latency);
    Ok(vec![
        Row::beside("server in Rust: dial, p50", "ms", ours.p50, theirs.p50, None),
        Row::beside("server in Rust: dial, p99", "ms", ours.p99, theirs.p99, Some(crate::DIAL_GOAL)),
    ])
}
