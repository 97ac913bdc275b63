//! Owns the measurements without the real server, where that is what limits: the agents under a server in Rust, in the same process as
//! the load.
//! Called by `main` after the measurements with the real server.
//! Must never set a goal: a server that is not the real one shows a limit, no more.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use lab::{
    bare::{Place, SERVER, Who, agent, cpu, cpu_of},
    fake::{Dials, Fake, Manners},
    load::latency,
};

use lab::bench::{Row, progress};

use crate::{Amount, Figures};

const PORT: u16 = 8191;
const CHUNK: usize = 32 << 10;

/// One connection both ways, and dials.
pub(crate) async fn without_server(place: &Place, amount: Amount) -> Result<Vec<Row>> {
    let mut fake = Fake::start(format!("{SERVER}:{PORT}").parse()?, &place.certs, Manners::default()).await?;
    let mut figures: [Figures; 7] = Default::default();
    for round in 0..amount.rounds {
        let turns = if round.is_multiple_of(2) { [Who::Ours, Who::Theirs] } else { [Who::Theirs, Who::Ours] };
        for who in turns {
            progress(&format!("under a server in Rust: {who:?}"));
            let process = agent(who, place, PORT)?;
            let stream =
                tokio::time::timeout(Duration::from_secs(10), fake.agent()).await.context("no agent came")??;
            let dials = Dials::new(stream);
            let address = format!("{}:7000", who.address());
            let bytes = amount.mib << 20;
            let mut connection = dials.dial(&address).await?;

            let (before, started, server) = (cpu(&process)?, Instant::now(), cpu_of(std::process::id())?);
            connection.send(Bytes::from(format!("SOURCE {bytes}\n"))).await?;
            let mut left = bytes;
            while left > 0 {
                left -= connection.receive().await.context("closed too early")?.len();
            }
            let down = amount.mib as f64 / started.elapsed().as_secs_f64();
            let down_busy = (cpu_of(std::process::id())? - server) / started.elapsed().as_secs_f64();
            let down_cpu = (cpu(&process)? - before) * 1024.0 / amount.mib as f64;

            let (before, started, server) = (cpu(&process)?, Instant::now(), cpu_of(std::process::id())?);
            let chunk = Bytes::from(vec![0; CHUNK]);
            connection.send(Bytes::from(format!("SINK {bytes}\n"))).await?;
            for _ in 0..bytes / CHUNK {
                connection.send(chunk.clone()).await?;
            }
            connection.receive().await.context("closed too early")?;
            let up = amount.mib as f64 / started.elapsed().as_secs_f64();
            let up_busy = (cpu_of(std::process::id())? - server) / started.elapsed().as_secs_f64();
            let up_cpu = (cpu(&process)? - before) * 1024.0 / amount.mib as f64;
            connection.close().await?;

            let mut took = Vec::new();
            for _ in 0..amount.dials {
                let started = Instant::now();
                let connection = dials.dial(&address).await?;
                took.push(started.elapsed());
                connection.close().await?;
            }
            let values = [down, down_cpu, down_busy, up, up_cpu, up_busy, latency(took).p99];
            figures.iter_mut().zip(values).for_each(|(figure, value)| figure.add(who, value));
        }
    }
    let names = [
        ("server in Rust: throughput to the control plane", "MiB/s"),
        ("server in Rust: CPU to the control plane", "s/GiB"),
        ("server in Rust: its own part of that", "cores"),
        ("server in Rust: throughput to the node", "MiB/s"),
        ("server in Rust: CPU to the node", "s/GiB"),
        ("server in Rust: its own part of that, to the node", "cores"),
        ("server in Rust: dial, p99", "ms"),
    ];
    Ok(figures.iter().zip(names).map(|(figure, (what, unit))| figure.row(what, unit, None)).collect())
}
