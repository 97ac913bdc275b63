//! Owns bytes both ways: how many a second, what they cost the agent, and what limits. Under the real server nobody has more than an agent
//! without endpoints; so the agents are measured under a server in Rust, too, in the same process as the load.
//! Called by `main`.
//! Must never give one agent a server, an endpoint or a turn that the other does not get, nor leave out what limits.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use lab::{
    bare::{Place, Who, agent, cpu_of},
    bench::{Goal, Pairs, Row, in_turn, median, progress},
    load::{Way, transfer_all},
    process::Process,
    servers::fake::{Connection, Dials, Fake, Manners},
};
use tokio::net::UnixStream;

use crate::{Amount, DIAL_GOAL, Subject, latencies};

/// What one connection has to have of the upstream agent's throughput.
const GOAL: Goal = Some(("at least", 2.0));

/// Both ways, and what they are called.
const WAYS: [(Way, &str); 2] = [(Way::ToControlPlane, "to the control plane"), (Way::ToNode, "to the node")];

/// CPU seconds so far of the agent and of the server.
#[derive(Clone, Copy, Default)]
struct Spent {
    agent: f64,
    server: f64,
}

/// What one side did in a round.
#[derive(Default)]
struct Did {
    /// MiB a second, turn by turn.
    speeds: Vec<f64>,
    mebibytes: f64,
    seconds: f64,
    spent: Spent,
}

/// What each side did, round by round.
struct Rounds<const N: usize>(Vec<[Did; N]>);

impl<const N: usize> Rounds<N> {
    /// A figure of two sides.
    fn pairs(&self, of: [usize; 2], figure: impl Fn(&Did) -> f64) -> Pairs {
        let mut pairs = Pairs::default();
        self.0.iter().for_each(|sides| pairs.add(of.map(|side| figure(&sides[side]))));
        pairs
    }

    /// MiB a second of two sides.
    fn speed(&self, sides: [usize; 2]) -> Pairs {
        self.pairs(sides, |did| median(&did.speeds))
    }

    /// Processor seconds of something for a GiB, of the first two sides.
    fn per_gib(&self, of: fn(&Spent) -> f64) -> Pairs {
        self.pairs([0, 1], |did| of(&did.spent) * 1024.0 / did.mebibytes)
    }
}

/// Rows for one, ten and a hundred connections each way, or for one only. The third subject has no endpoints.
pub(crate) async fn measure(
    subjects: [&Subject; 3],
    server: &Process,
    amount: Amount,
    single: bool,
) -> Result<Vec<Row>> {
    let spent = |side: usize| Ok(Spent { agent: cpu_of(subjects[side].process.id())?, server: cpu_of(server.id())? });
    let mut rows = Vec::new();
    for (way, there) in WAYS {
        for connections in if single { &[1][..] } else { &[1, 10, 100] } {
            let name =
                format!("throughput {there}, {connections} connection{}", if *connections == 1 { "" } else { "s" });
            progress(&name);
            let open = async |side: usize| subjects[side].load.connect_all(*connections).await;
            let moved = async |streams: &mut Vec<UnixStream>| transfer_all(streams, way, amount.mib << 20).await;
            let rounds: Rounds<3> = rounds(amount, open, spent, moved, async |_| Ok(())).await?;
            let busy = rounds.pairs([0, 1], |did| did.spent.server / did.seconds);
            rows.push(rounds.speed([0, 1]).row(&name, "MiB/s", if *connections == 1 { GOAL } else { None }));
            rows.push(rounds.speed([2, 1]).row(format!("{name}: an agent without endpoints"), "MiB/s", None));
            let work = rounds.per_gib(|spent| spent.agent);
            rows.push(work.row(name.replace("throughput", "CPU"), "s/GiB", Some(("at most", 0.4))));
            rows.push(busy.row(name.replace("throughput", "proxy-server busy,"), "cores", None));
        }
    }
    Ok(rows)
}

/// Rounds of short turns of each side, over what each has open in the round: what happens elsewhere on the machine meets all alike.
async fn rounds<C, const N: usize>(
    amount: Amount,
    open: impl AsyncFn(usize) -> Result<C>,
    spent: impl Fn(usize) -> Result<Spent>,
    moved: impl AsyncFn(&mut C) -> Result<Duration>,
    close: impl AsyncFn(C) -> Result<()>,
) -> Result<Rounds<N>> {
    let mut rounds = Vec::new();
    for round in 0..amount.rounds {
        let mut opened = Vec::new();
        for side in 0..N {
            opened.push(open(side).await?);
        }
        let mut sides = std::array::from_fn(|_| Did::default());
        for turn in 0..amount.turns {
            for side in in_turn::<N>(round + turn) {
                let before = spent(side)?;
                let took = moved(&mut opened[side]).await?.as_secs_f64();
                let (after, did) = (spent(side)?, &mut sides[side]);
                did.speeds.push(amount.mib as f64 / took);
                did.mebibytes += amount.mib as f64;
                did.seconds += took;
                did.spent.agent += after.agent - before.agent;
                did.spent.server += after.server - before.server;
            }
        }
        for opened in opened {
            close(opened).await?;
        }
        rounds.push(sides);
    }
    Ok(Rounds(rounds))
}

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
        rows.extend(one_connection(&sides, amount, way, there).await?);
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

async fn one_connection(sides: &[Side; 2], amount: Amount, way: Way, there: &str) -> Result<Vec<Row>> {
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
