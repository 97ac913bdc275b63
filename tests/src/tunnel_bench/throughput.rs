//! Owns bytes both ways under the real server: how many a second, what they cost the agent, and what that server lets anybody have.
//! Called by `main`.
//! Must never leave out what limits: more than an agent without endpoints gets, no agent can have.

use std::time::Duration;

use anyhow::Result;
use lab::{
    bare::cpu,
    bench::{Goal, Pairs, Row, in_turn, median, progress},
    load::{Way, transfer_all},
    process::Process,
};
use tokio::net::UnixStream;

use crate::{Amount, Subject};

/// What one connection has to have of the upstream agent's throughput.
pub(crate) const GOAL: Goal = Some(("at least", 2.0));

/// CPU seconds so far of the agent and of the server.
#[derive(Clone, Copy, Default)]
pub(crate) struct Spent {
    pub(crate) agent: f64,
    pub(crate) server: f64,
}

/// What one side did in a round.
#[derive(Default)]
pub(crate) struct Did {
    /// MiB a second, turn by turn.
    speeds: Vec<f64>,
    mebibytes: f64,
    seconds: f64,
    pub(crate) spent: Spent,
}

impl Did {
    /// MiB a second.
    pub(crate) fn speed(&self) -> f64 {
        median(&self.speeds)
    }

    /// So many seconds, for a GiB.
    pub(crate) fn per_gib(&self, seconds: f64) -> f64 {
        seconds * 1024.0 / self.mebibytes
    }
}

/// Rows for one, ten and a hundred connections each way, or for one only. The third subject has no endpoints.
pub(crate) async fn measure(
    subjects: [&Subject; 3],
    server: &Process,
    amount: Amount,
    single: bool,
) -> Result<Vec<Row>> {
    let spent =
        |side: usize| -> Result<Spent> { Ok(Spent { agent: cpu(&subjects[side].process)?, server: cpu(server)? }) };
    let mut rows = Vec::new();
    for (way, there) in [(Way::ToControlPlane, "to the control plane"), (Way::ToNode, "to the node")] {
        for connections in [1, 10, 100] {
            if single && connections > 1 {
                continue;
            }
            let name =
                format!("throughput {there}, {connections} connection{}", if connections == 1 { "" } else { "s" });
            progress(&name);
            let [mut speed, mut work, mut busy, mut ceiling]: [Pairs; 4] = Default::default();
            for round in 0..amount.rounds {
                let open = async |side: usize| subjects[side].load.connect_all(connections).await;
                let mut open = [open(0).await?, open(1).await?, open(2).await?];
                let moved = async |streams: &mut Vec<UnixStream>| transfer_all(streams, way, amount.mib << 20).await;
                let [ours, other, null] = round_of(amount, round, &mut open, spent, moved).await?;
                speed.add(ours.speed(), other.speed());
                work.add(ours.per_gib(ours.spent.agent), other.per_gib(other.spent.agent));
                busy.add(ours.spent.server / ours.seconds, other.spent.server / other.seconds);
                ceiling.add(null.speed(), other.speed());
            }
            rows.push(speed.row(&name, "MiB/s", if connections == 1 { GOAL } else { None }));
            rows.push(ceiling.row(format!("{name}: an agent without endpoints"), "MiB/s", None));
            rows.push(work.row(name.replace("throughput", "CPU"), "s/GiB", Some(("at most", 0.4))));
            rows.push(busy.row(name.replace("throughput", "proxy-server busy,"), "cores", None));
        }
    }
    Ok(rows)
}

/// Some short turns of each side over what each has open in this round: what happens elsewhere on the machine meets all alike.
pub(crate) async fn round_of<C, const N: usize>(
    amount: Amount,
    round: usize,
    open: &mut [C; N],
    spent: impl Fn(usize) -> Result<Spent>,
    moved: impl AsyncFn(&mut C) -> Result<Duration>,
) -> Result<[Did; N]> {
    let mut sides = std::array::from_fn(|_| Did::default());
    for turn in 0..amount.turns {
        for side in in_turn::<N>(round + turn) {
            let before = spent(side)?;
            let took = moved(&mut open[side]).await?.as_secs_f64();
            let (after, did) = (spent(side)?, &mut sides[side]);
            did.speeds.push(amount.mib as f64 / took);
            did.mebibytes += amount.mib as f64;
            did.seconds += took;
            did.spent.agent += after.agent - before.agent;
            did.spent.server += after.server - before.server;
        }
    }
    Ok(sides)
}
