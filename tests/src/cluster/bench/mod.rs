//! Owns what the guard costs a cluster: exec and logs beside the upstream agent and beside no tunnel at all, traffic between pods.
//! Called by `nodeguard-cluster bench`.
//! Must never carry a request of one way by another, nor compare figures of two clusters: whoever is compared serves the same node in the same minute, in turns.

mod pods;
mod requests;

use std::sync::Arc;

use anyhow::{Context, Result};

pub use self::pods::{converse, serve};
use super::{
    Cluster,
    addresses::filled,
    control::{Egress, Front},
    eventually, keep_logs,
    place::{Place, Where},
};
use crate::bench::{Row, print, progress};

/// The ports of the API servers whose way is the upstream agent behind a proxy-server of its own, and that dial the node themselves.
const UPSTREAM: u16 = 6444;
const DIRECT: u16 = 6445;

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
    let mut cluster = Cluster::start(&place, &["proxy-agent.tar"])?;
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
    other_ways(cluster)?;
    let ways = [("guard", 6443), ("upstream agent", UPSTREAM), ("no tunnel", DIRECT)];
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

/// Starts the other ways to the node. The upstream agent has as much of the machine as the guard.
fn other_ways(cluster: &mut Cluster) -> Result<()> {
    let own = Front::own(Egress::Grpc);
    cluster.control.add(Front { port: UPSTREAM, agents: Some(8232), ..own })?;
    cluster.control.add(Front { port: DIRECT, agents: None, ..own })?;
    // The one that dials itself has to be let out.
    cluster.place.let_out(10250)?;
    cluster.apply(&filled(include_str!("../files/upstream-agent.yaml")))?;
    cluster.rolled_out("upstream-agent").context("the upstream agent")
}
