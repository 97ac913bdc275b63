//! Owns traffic from pod to pod: between two processes, over sockets that were made in the pods' cgroups and over others that were made in a cgroup
//! beside the node's.
//! Called by the bench; the client is this program again, as `nodeguard-cluster converse`.
//! Must never compare two pairs that differ in anything but the guard: same network namespaces, processes, buffers and processors.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use super::Amount;
use crate::{
    bench::{Pairs, Row, progress, round_of},
    cluster::{Cluster, addresses::socket, place::Where, say},
    process::{Process, command},
    sweep,
    traffic::{self, Ask, CHUNK, Conversation, NODE_CPU, OTHER_CPU, fixed, in_both, listen, pin},
};

/// A port that the policy of the bench guards, and one that it leaves alone.
const PORTS: [u16; 2] = [9_000, 9_100];

/// How long a round of each kind of traffic lasts, both sides together.
const ROUND: Duration = Duration::from_secs(1);

/// Throughput both ways, and requests with answers. Each round has processes of its own: where one stands in memory stays as it is while it
/// lasts.
pub(super) fn measure(cluster: &Cluster, amount: Amount) -> Result<Vec<Row>> {
    let (server, client) = (Pod::find(cluster, "web")?, Pod::find(cluster, "bystander")?);
    let at_least = Some(("at least", 0.97));
    // What a turn asks, of how many, and how many make one of the unit.
    let kinds = [
        ('P', 4 << 20, 1 << 20, "MiB/s", "pod to pod: throughput there", at_least),
        ('G', 4 << 20, 1 << 20, "MiB/s", "pod to pod: throughput back", at_least),
        ('T', 100, 1, "1/s", "pod to pod: requests and answers", None),
    ];
    let mut pairs: [Pairs; 3] = Default::default();
    for round in 0..amount.rounds {
        let (mut talk, mut ratios) = (Talk::start(cluster, &server, &client)?, Vec::new());
        for ((letter, count, one, ..), pairs) in kinds.iter().zip(&mut pairs) {
            let turn = |side| Ok(((count / one) as f64, talk.ask(side, *letter, *count)?));
            let [ours, other] = round_of(ROUND, round, turn)?;
            pairs.add(ours, other);
            ratios.push(format!("{:.3}", ours / other));
        }
        progress(&format!("pod to pod, round {} of {}: {}", round + 1, amount.rounds, ratios.join(", ")));
    }
    let rows = kinds.iter().zip(&pairs);
    Ok(rows.map(|((.., unit, what, goal), pairs)| pairs.row(format!("{what}, guarded | not"), unit, *goal)).collect())
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

/// A server and a client: each has a socket that was made in its pod's cgroup and one that was made in the cgroup beside the node's.
struct Talk {
    _server: Process,
    client: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Talk {
    fn start(cluster: &Cluster, server: &Pod, client: &Pod) -> Result<Talk> {
        let (beside, address) = (root()?.join(cluster.place.cgroup(Where::Control)), cluster.address("web")?);
        let ports = PORTS.map(|port| socket(&address, port).map(|at| at.to_string()));
        let ports = ports.into_iter().collect::<Result<Vec<_>>>()?;
        let program = |pod: &Pod, what: &str| -> Result<_> {
            let mut program = command(&std::env::current_exe()?, File::open(&pod.network)?, &pod.cgroup)?;
            program.arg(what).arg(&beside).args(&ports);
            Ok(program)
        };
        let log = cluster.place.directory.join("serve.log");
        let server = Process::start_ready("server", program(server, "serve")?, &log)?;
        let mut converse = program(client, "converse")?;
        let mut client = converse.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let asks = client.stdin.take().context("stdin")?;
        let answers = BufReader::new(client.stdout.take().context("stdout")?);
        Ok(Talk { _server: server, client, asks, answers })
    }

    /// Asks over one of the two sockets.
    fn ask(&mut self, side: usize, letter: char, count: usize) -> Result<Duration> {
        writeln!(self.asks, "{side} {letter} {count}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the client ended");
        Ok(Duration::from_nanos(line.trim().parse()?))
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// What the client's process does: asks what it reads, writes the nanoseconds, until there is nothing to read.
pub fn converse(beside: &Path, to: [SocketAddr; 2]) -> Result<()> {
    pin(OTHER_CPU)?;
    let mut conversations = in_both(beside, |side| fixed(Conversation::open(to[side])?))?;
    let mut buffer = vec![0; CHUNK];
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let [side, letter, count] = words[..] else { bail!("a side, a letter and a count") };
        let ask = match letter {
            "P" => Ask::Put,
            "G" => Ask::Get,
            "T" => Ask::Transact,
            _ => bail!("no such request: {letter}"),
        };
        let conversation = conversations.get_mut(side.parse::<usize>()?).context("two sides")?;
        say(&conversation.ask(ask, count.parse()?, &mut buffer)?.as_nanos().to_string())?;
    }
    Ok(())
}

/// What the server's process does.
pub fn serve(beside: &Path, at: [SocketAddr; 2]) -> Result<()> {
    pin(NODE_CPU)?;
    traffic::serve(in_both(beside, |side| fixed(listen(at[side])?))?)
}
