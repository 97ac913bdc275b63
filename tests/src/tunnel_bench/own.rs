//! Owns the measurements without the real server, which is what limits: the agents under a server in Rust, in the same process as the load.
//! Called by `main` after the measurements with the real server.
//! Must never give one agent a server, an endpoint or a turn that the other does not get.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use lab::{
    bare::{Place, Who, agent, cpu_of},
    bench::{Row, progress},
    load::Way,
    process::Process,
    servers::fake::{Connection, Dials, Fake, Manners},
};

use crate::{
    Amount, DIAL_GOAL, latencies,
    throughput::{GOAL, Rounds, Spent, WAYS, rounds},
};

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
    let mut fake = Fake::start(place, PORT, Manners::default()).await?;
    let sides = [side(Who::Ours, place, &mut fake).await?, side(Who::Theirs, place, &mut fake).await?];
    let mut rows = Vec::new();
    for (way, there) in WAYS {
        progress(&format!("server in Rust: throughput {there}"));
        rows.extend(throughput(&sides, amount, way, there).await?);
    }
    progress("server in Rust: dial");
    let [ours, theirs] = latencies(amount, async |which, count| sides[which].dials(count).await).await?;
    rows.push(Row::beside("server in Rust: dial, p50", "ms", ours.p50, theirs.p50, None));
    rows.push(Row::beside("server in Rust: dial, p99", "ms", ours.p99, theirs.p99, DIAL_GOAL));
    Ok(rows)
}

async fn side(who: Who, place: &Place, fake: &mut Fake) -> Result<Side> {
    let process = agent(who, place, PORT)?;
    Ok(Side { process, dials: fake.dials().await?, address: format!("{}:7000", who.address()) })
}

impl Side {
    /// Dials one after the other; what each took.
    async fn dials(&self, count: usize) -> Result<Vec<Duration>> {
        let mut took = Vec::with_capacity(count);
        for _ in 0..count {
            let started = Instant::now();
            let connection = self.dials.dial(&self.address).await?;
            took.push(started.elapsed());
            connection.close().await?;
        }
        Ok(took)
    }
}

async fn throughput(sides: &[Side; 2], amount: Amount, way: Way, there: &str) -> Result<Vec<Row>> {
    // The server is in this process, and the load, too.
    let spent =
        |side: usize| Ok(Spent { agent: cpu_of(sides[side].process.id())?, server: cpu_of(std::process::id())? });
    let open = async |side: usize| sides[side].dials.dial(&sides[side].address).await;
    let moved = async |connection: &mut Connection| transfer(connection, way, amount.mib << 20).await;
    let rounds: Rounds<2> = rounds(amount, open, spent, moved, Connection::close).await?;
    let [work, server] = [rounds.per_gib(|spent| spent.agent), rounds.per_gib(|spent| spent.server)];
    Ok(vec![
        rounds.speed([0, 1]).row(format!("server in Rust: throughput {there}, 1 connection"), "MiB/s", GOAL),
        work.row(format!("server in Rust: CPU {there}, 1 connection"), "s/GiB", None),
        server.row(format!("server in Rust: its own CPU and the load's, {there}"), "s/GiB", None),
    ])
}

/// Moves so many bytes; how long that took.
async fn transfer(connection: &mut Connection, way: Way, bytes: usize) -> Result<Duration> {
    let started = Instant::now();
    match way {
        Way::ToControlPlane => connection.fetch(bytes).await?,
        Way::ToNode => {
            let chunk = Bytes::from(vec![0; CHUNK]);
            connection.send(Bytes::from(format!("SINK {bytes}\n"))).await?;
            for _ in 0..bytes / CHUNK {
                connection.send(chunk.clone()).await?;
            }
            connection.receive().await.context("closed too early")?;
        }
    }
    Ok(started.elapsed())
}
