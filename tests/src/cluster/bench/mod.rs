//! Owns what the guard costs a cluster: exec and logs beside the upstream agent and beside no tunnel at all, traffic between pods.
//! Called by `nodeguard-cluster bench`.
//! Must never compare figures of two clusters: whoever is compared serves the same node in the same minute, in turns.

mod fronts;
mod pods;
mod requests;

use std::sync::Arc;

use anyhow::Result;

pub use self::pods::{converse, serve};
use super::{Cluster, addresses::filled, eventually, keep_logs, place::Place, place::Where};
use crate::bench::{Row, print, progress};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Amount {
    /// Execs and logs by each way.
    requests: usize,
    /// Rounds of traffic between pods.
    rounds: usize,
}

/// Measures all of it and prints the rows.
pub fn bench(quick: bool) -> Result<()> {
    let amount = if quick { Amount { requests: 20, rounds: 2 } } else { Amount { requests: 200, rounds: 40 } };
    let place = Arc::new(Place::new()?);
    let mut cluster = Cluster::start(&place, &[fronts::IMAGE])?;
    cluster.install_guard()?;
    cluster.pods(include_str!("../files/bench-pods.yaml"))?;
    cluster.enforce(&filled(include_str!("../files/bench-policy.yaml")))?;
    progress("the cluster stands, the guard enforces");
    match measure(&mut cluster, amount) {
        Ok(rows) => print(&rows),
        Err(error) => {
            keep_logs(&place)?;
            Err(error)
        }
    }
}

fn measure(cluster: &mut Cluster, amount: Amount) -> Result<Vec<Row>> {
    let mut rows = pods::measure(cluster, amount)?;
    fronts::start(cluster)?;
    let ways = [("guard", 6443), ("upstream agent", fronts::UPSTREAM), ("no tunnel", fronts::DIRECT)];
    let client = requests::Client::new(&cluster.pki)?;
    rows.extend(cluster.place.run(Where::Control, || {
        for (name, port) in ways {
            eventually(&format!("exec works: {name}"), || Ok(client.exec(port).is_ok()))?;
        }
        requests::measure(&client, ways.map(|(_, port)| port), amount)
    })?);
    cluster.check()?;
    Ok(rows)
}
