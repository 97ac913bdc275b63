//! Owns traffic from pod to pod: between two processes, over sockets that were made in the pods' cgroups and over others that were made in a cgroup
//! beside the node's.
//! Called by the bench; client and server are this program again, as `nodeguard-cluster converse` and `serve`.
//! Must never compare two pairs that differ in anything but the guard: same network namespaces, processes, buffers and processors.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use super::Amount;
use crate::{
    bench::{Pairs, Row, progress, round_of},
    cluster::{Cluster, addresses::socket, place::Where, say},
    process::{Process, command, run},
    sweep,
    traffic::{self, CHUNK, Conversation, KINDS, NODE_CPU, OTHER_CPU, fixed, in_both, listen, pin},
};

/// A port that the policy of the bench guards, and one that it leaves alone.
const PORTS: [u16; 2] = [9_000, 9_100];

/// How long a round of each kind of traffic lasts, both sides together.
const ROUND: Duration = Duration::from_secs(1);

/// Throughput both ways, and requests with answers. Each round has processes of its own: where one stands in memory stays as it is while it
/// lasts.
pub(super) fn measure(cluster: &Cluster, amount: Amount) -> Result<Vec<Row>> {
    let (server, client) = (Pod::find(cluster, "web")?, Pod::find(cluster, "bystander")?);
    let (beside, address) = (root()?.join(cluster.place.cgroup(Where::Control)), cluster.address("web")?);
    let mut pairs: [Pairs; 3] = Default::default();
    for round in 0..amount.rounds {
        let program = |pod: &Pod, what: &str| -> Result<_> {
            let mut program = command(&std::env::current_exe()?, File::open(&pod.network)?, &pod.cgroup)?;
            program.arg(what).arg(&beside);
            for port in PORTS {
                program.arg(socket(&address, port)?.to_string());
            }
            Ok(program)
        };
        let log = cluster.place.directory.join("serve.log");
        let _server = Process::start_ready("server", program(&server, "serve")?, &log)?;
        let mut converse = program(&client, "converse")?;
        converse.arg(round.to_string());
        let rates: [[f64; 2]; 3] = serde_json::from_str(&run(converse, "")?)?;
        pairs.iter_mut().zip(rates).for_each(|(pairs, rates)| pairs.add(rates));
        let ratios = rates.map(|[ours, other]| format!("{:.3}", ours / other)).join(", ");
        progress(&format!("pod to pod, round {} of {}: {ratios}", round + 1, amount.rounds));
    }
    let at_least = Some(("at least", 0.97));
    let names = [("throughput there", at_least), ("throughput back", at_least), ("requests and answers", None)];
    let rows = KINDS.iter().zip(pairs).zip(names);
    let row = |((kind, pairs), (what, goal)): ((&traffic::Kind, Pairs), _)| {
        pairs.row(format!("pod to pod: {what}, guarded | not"), kind.unit, goal)
    };
    Ok(rows.map(row).collect())
}

/// A pod on the node: what a process needs to stand in it.
struct Pod {
    network: PathBuf,
    cgroup: PathBuf,
}

impl Pod {
    fn find(cluster: &Cluster, name: &str) -> Result<Pod> {
        let uid = cluster.kubectl(&format!("get pod {name} -o jsonpath={{.metadata.uid}}")).run()?;
        let sleeps =
            |cgroups: &str, _: &Path, words: &[&str]| cgroups.contains(&uid) && words.first() == Some(&"sleep");
        let process = cluster.place.process(Where::Node, sleeps).with_context(|| name.to_owned())?;
        let cgroups = std::fs::read_to_string(process.join("cgroup"))?;
        let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).context("cgroups version 2")?;
        Ok(Pod { network: process.join("ns/net"), cgroup: root()?.join(own) })
    }
}

/// Where version 2 of cgroups is mounted.
fn root() -> Result<PathBuf> {
    sweep::hierarchies().into_iter().next().context("no cgroups")
}

/// What the client's process does: a round of each kind of traffic over two sockets, one made in its pod's cgroup, one beside it.
pub fn converse(beside: &Path, to: [SocketAddr; 2], round: usize) -> Result<()> {
    pin(OTHER_CPU)?;
    let mut sides = in_both(beside, |side| fixed(Conversation::open(to[side])?))?;
    let mut buffer = vec![0; CHUNK];
    let mut rates = Vec::new();
    for kind in &KINDS {
        rates.push(round_of(ROUND, round, |side| kind.turn(&mut sides[side], &mut buffer))?);
    }
    say(&serde_json::to_string(&rates)?)
}

/// What the server's process does.
pub fn serve(beside: &Path, at: [SocketAddr; 2]) -> Result<()> {
    pin(NODE_CPU)?;
    traffic::serve(in_both(beside, |side| fixed(listen(at[side])?))?)
}
