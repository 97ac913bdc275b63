//! Owns bytes both ways under the real server: how many a second, what they cost the agent, and what that server lets anybody have.
//! Called by `main`.
//! Must never leave out what limits: more than an agent without endpoints gets, no agent can have.

use std::time::Duration;

use anyhow::Result;
use lab::{
    bare::cpu_of,
    bench::{Goal, Pairs, Row, in_turn, median, progress},
    load::{Way, transfer_all},
    process::Process,
};
use tokio::net::UnixStream;

use crate::{Amount, Subject};

/// What one connection has to have of the upstream agent's throughput.
pub(crate) const GOAL: Goal = Some(("at least", 2.0));

/// Both ways, and what they are called.
pub(crate) const WAYS: [(Way, &str); 2] = [(Way::ToControlPlane, "to the control plane"), (Way::ToNode, "to the node")];

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
    spent: Spent,
}

/// What each side did, round by round.
pub(crate) struct Rounds<const N: usize>(Vec<[Did; N]>);

impl<const N: usize> Rounds<N> {
    /// A figure of two sides.
    fn pairs(&self, of: [usize; 2], figure: impl Fn(&Did) -> f64) -> Pairs {
        let mut pairs = Pairs::default();
        self.0.iter().for_each(|sides| pairs.add(of.map(|side| figure(&sides[side]))));
        pairs
    }

    /// MiB a second of two sides.
    pub(crate) fn speed(&self, sides: [usize; 2]) -> Pairs {
        self.pairs(sides, |did| median(&did.speeds))
    }

    /// Processor seconds of something for a GiB, of the first two sides.
    pub(crate) fn per_gib(&self, of: fn(&Spent) -> f64) -> Pairs {
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
pub(crate) async fn rounds<C, const N: usize>(
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
