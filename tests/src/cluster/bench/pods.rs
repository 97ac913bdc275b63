//! Owns traffic from pod to pod: between two processes, over sockets that were made in the pods' cgroups and over others that were made in a cgroup
//! beside the node's.
//! Called by `bench`; the client is this program again, as `nodeguard-cluster converse`.
//! Must never compare two pairs that differ in anything but the guard: same network namespaces, processes, buffers and processors.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use lab::{
    bench::{Pairs, Row, progress, round_of},
    process::{Process, command, until},
    sweep,
    traffic::{self, Ask, CHUNK, Conversation, NODE_CPU, OTHER_CPU, fixed, in_both, listen, pin},
};
use serde_json::Value;

use super::Amount;
use crate::{addresses::socket, install::Cluster, place::Where};

/// The port that the policy guards, and the one beside it.
pub(super) const GUARDED: u16 = 9_000;
const FREE: u16 = 9_100;

/// How long a round of each kind of traffic lasts, both sides together.
const ROUND: Duration = Duration::from_secs(1);

/// Throughput both ways, and requests with answers. Each round has processes of its own: where one stands in memory stays as it is while it
/// lasts.
pub(super) fn measure(cluster: &Cluster<'_>, amount: Amount) -> Result<Vec<Row>> {
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
    fn find(cluster: &Cluster<'_>, name: &str) -> Result<Pod> {
        let about: Value = serde_json::from_str(&cluster.kubectl.run(&["get", "pod", name, "-o", "json"])?)?;
        let uid = about.pointer("/metadata/uid").and_then(Value::as_str).context("a pod has a uid")?.to_owned();
        for entry in fs::read_dir("/proc")?.flatten() {
            let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            let Some(own) = groups.lines().find_map(|line| line.strip_prefix("0::")) else { continue };
            let sleeps = fs::read(entry.path().join("cmdline")).unwrap_or_default().starts_with(b"sleep\0");
            if own.contains(&uid) && own.contains(&cluster.place.cgroup_name(Where::Node)) && sleeps {
                let root = sweep::hierarchies().into_iter().next().context("no cgroups")?;
                return Ok(Pod {
                    network: entry.path().join("ns/net"),
                    cgroup: root.join(own.trim_start_matches('/')),
                });
            }
        }
        bail!("{name} has no process on this machine")
    }
}

/// A server and a client: each has a socket that was made in its pod's cgroup and one that was made in the cgroup beside the node's.
struct Talk {
    _server: Process,
    client: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Talk {
    fn start(cluster: &Cluster<'_>, server: &Pod, client: &Pod) -> Result<Talk> {
        let beside = sweep::hierarchies().first().context("no cgroups")?.join(cluster.place.cgroup_beside());
        let address = cluster.address("web")?;
        let ports = [socket(&address, GUARDED)?, socket(&address, FREE)?].map(|at| at.to_string());
        let program = |pod: &Pod, what: &str| -> Result<_> {
            let mut program = command(&std::env::current_exe()?, File::open(&pod.network)?, &pod.cgroup)?;
            program.arg(what).arg(&beside).args(&ports);
            Ok(program)
        };
        let log = cluster.place.directory.join("serve.log");
        // Without what the server of the round before said.
        File::create(&log)?;
        let mut server = Process::start("server", program(server, "serve")?, &log)?;
        until("the server listens", Duration::from_secs(10), || {
            server.check()?;
            Ok(server.printed().contains("ready"))
        })?;
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
pub(crate) fn converse(beside: &Path, to: [SocketAddr; 2]) -> Result<bool> {
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
        crate::say(&conversation.ask(ask, count.parse()?, &mut buffer)?.as_nanos().to_string())?;
    }
    Ok(true)
}

/// What the server's process does.
pub(crate) fn serve(beside: &Path, at: [SocketAddr; 2]) -> Result<bool> {
    pin(NODE_CPU)?;
    traffic::serve(in_both(beside, |side| fixed(listen(at[side])?))?).map(|()| true)
}
