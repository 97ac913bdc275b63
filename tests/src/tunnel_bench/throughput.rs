//! Owns bytes both ways under the real server: how many a second, what they cost the agent, and what that server lets anybody have.
//! Called by `main`.
//! Must never leave out what limits: where the rest of the machine has no time left, no agent can be faster.

use anyhow::{Context, Result};
use lab::{
    bare::{cpu, cpu_of},
    bench::{Pairs, Row, median, progress},
    load::{Way, transfer_all},
    process::Process,
};

use crate::{Amount, Subject, both};

/// What one connection has to have of the upstream agent's throughput.
pub(crate) const GOAL: f64 = 2.0;
/// And of its CPU time.
const CPU_GOAL: (&str, f64) = ("at most", 0.4);

/// CPU seconds so far of the agent, the server and everybody else who moves the bytes.
#[derive(Clone, Copy, Default)]
struct Spent {
    agent: f64,
    server: f64,
    rest: f64,
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

/// Rows for one, ten and a hundred connections each way, or for one only.
pub(crate) async fn measure(
    subjects: &mut [Subject; 2],
    server: &Process,
    endpoint: &Process,
    amount: Amount,
    single: bool,
) -> Result<Vec<Row>> {
    let processors = std::thread::available_parallelism()?.get() as f64;
    let mut rows = Vec::new();
    for (way, there) in [(Way::ToControlPlane, "to the control plane"), (Way::ToNode, "to the node")] {
        for connections in [1, 10, 100] {
            if single && connections > 1 {
                continue;
            }
            let name =
                format!("throughput {there}, {connections} connection{}", if connections == 1 { "" } else { "s" });
            progress(&name);
            let [mut speed, mut work, mut busy, mut most]: [Pairs; 4] = Default::default();
            for round in 0..amount.rounds {
                let [ours, other] = round_of(subjects, (server, endpoint), amount, (way, connections), round).await?;
                let per_gib = |did: &Did| did.spent.agent * 1024.0 / did.mebibytes;
                let speeds = [&ours, &other].map(|did| median(&did.speeds));
                speed.add(speeds[0], speeds[1]);
                work.add(per_gib(&ours), per_gib(&other));
                busy.add(ours.spent.server / ours.seconds, other.spent.server / other.seconds);
                // All processors, and an agent that needs none of their time.
                most.add(processors * ours.mebibytes / (ours.spent.server + ours.spent.rest), speeds[1]);
            }
            let most = most.row(format!("{name}: most that an agent without cost could have"), "MiB/s", None);
            let wanted = connections == 1 && most.ratio >= GOAL;
            rows.push(speed.row(&name, "MiB/s", wanted.then_some(("at least", GOAL))));
            if connections == 1 {
                rows.push(most);
            }
            rows.push(work.row(name.replace("throughput", "CPU"), "s/GiB", Some(CPU_GOAL)));
            rows.push(busy.row(name.replace("throughput", "proxy-server busy,"), "cores", None));
        }
    }
    Ok(rows)
}

/// Some short turns of both over connections of this round: what happens elsewhere on the machine meets both alike.
async fn round_of(
    subjects: &mut [Subject; 2],
    (server, endpoint): (&Process, &Process),
    amount: Amount,
    (way, connections): (Way, usize),
    round: usize,
) -> Result<[Did; 2]> {
    let mut open = Vec::new();
    for subject in subjects.iter() {
        open.push(subject.load.connect_all(connections).await?);
    }
    let mut did: [Did; 2] = Default::default();
    for turn in 0..amount.turns {
        for side in both(round + turn) {
            let (subject, streams) = (&subjects[side], open.get_mut(side).context("two sides")?);
            let spent = || -> Result<Spent> {
                let rest = cpu(endpoint)? + cpu_of(std::process::id())?;
                Ok(Spent { agent: cpu(&subject.process)?, server: cpu(server)?, rest })
            };
            let before = spent()?;
            let took = transfer_all(streams, way, amount.mib << 20).await?.as_secs_f64();
            let (after, did) = (spent()?, &mut did[side]);
            did.speeds.push(amount.mib as f64 / took);
            did.mebibytes += amount.mib as f64;
            did.seconds += took;
            did.spent.agent += after.agent - before.agent;
            did.spent.server += after.server - before.server;
            did.spent.rest += after.rest - before.rest;
        }
    }
    Ok(did)
}
