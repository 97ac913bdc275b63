//! Owns traffic from pod to pod: once between processes in the pods' cgroups, once between the same ones in a cgroup beside the node's.
//! Called by `bench`; the client is this program again, as `nodeguard-cluster converse`.
//! Must never compare two pairs that differ in anything but the guard: same network namespaces, same program, same processors.

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
    traffic::{self, Ask, Conversation, OTHER_CPU, pin},
};
use serde_json::Value;

use super::Amount;
use crate::{addresses::socket, install::Cluster, place::Where};

/// The port that the policy guards, and the one beside it.
pub(super) const GUARDED: u16 = 9_000;
const FREE: u16 = 9_100;

/// How long a round of each kind of traffic lasts, both sides together.
const ROUND: Duration = Duration::from_secs(2);

/// Throughput both ways, and requests with answers. Each round has processes of its own: where one stands in memory stays as it is while it
/// lasts.
pub(super) fn measure(cluster: &Cluster<'_>, amount: Amount) -> Result<Vec<Row>> {
    let (server, client) = (Pod::find(cluster, "web")?, Pod::find(cluster, "bystander")?);
    let beside = sweep::hierarchies().first().context("no cgroups")?.join(cluster.place.cgroup_beside());
    let address = cluster.address("web")?;
    let at_least = Some(("at least", 0.97));
    // What a turn asks, of how many, and how many make one of the unit.
    let kinds = [
        ('P', 4 << 20, 1 << 20, "MiB/s", "pod to pod: throughput there", at_least),
        ('G', 4 << 20, 1 << 20, "MiB/s", "pod to pod: throughput back", at_least),
        ('T', 100, 1, "1/s", "pod to pod: requests and answers", None),
    ];
    let mut pairs: [Pairs; 3] = Default::default();
    for round in 0..amount.rounds {
        progress(&format!("pod to pod, round {} of {}", round + 1, amount.rounds));
        let mut sides = Vec::new();
        for (port, cgroups) in [(GUARDED, [&server.cgroup, &client.cgroup]), (FREE, [&beside, &beside])] {
            sides.push(Side::start(cluster, &server, &client, cgroups, socket(&address, port)?)?);
        }
        for ((letter, count, one, ..), pairs) in kinds.iter().zip(&mut pairs) {
            let [ours, other] = round_of(ROUND, round, |side| {
                let side = sides.get_mut(side).context("two sides")?;
                Ok(((count / one) as f64, side.ask(*letter, *count)?))
            })?;
            pairs.add(ours, other);
        }
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

/// A server and a client, both guarded or both not.
struct Side {
    _server: Process,
    client: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Side {
    fn start(
        cluster: &Cluster<'_>,
        server: &Pod,
        client: &Pod,
        [server_cgroup, client_cgroup]: [&PathBuf; 2],
        to: SocketAddr,
    ) -> Result<Side> {
        let program = |pod: &Pod, cgroup: &Path| command(&std::env::current_exe()?, File::open(&pod.network)?, cgroup);
        let mut serve = program(server, server_cgroup)?;
        serve.args(["serve", &to.to_string()]);
        let log = cluster.place.directory.join(format!("serve-{}.log", to.port()));
        // Without what the server of the round before said.
        File::create(&log)?;
        let mut server = Process::start("server", serve, &log)?;
        until("the server listens", Duration::from_secs(10), || {
            server.check()?;
            Ok(server.printed().contains("ready"))
        })?;
        let mut converse = program(client, client_cgroup)?;
        converse.args(["converse", &to.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = converse.spawn()?;
        let asks = client.stdin.take().context("stdin")?;
        let answers = BufReader::new(client.stdout.take().context("stdout")?);
        Ok(Side { _server: server, client, asks, answers })
    }

    fn ask(&mut self, letter: char, count: usize) -> Result<Duration> {
        writeln!(self.asks, "{letter} {count}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the client ended");
        Ok(Duration::from_nanos(line.trim().parse()?))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// What the client's process does: asks what it reads, writes the nanoseconds, until there is nothing to read.
pub(crate) fn converse(to: SocketAddr) -> Result<bool> {
    pin(OTHER_CPU)?;
    let mut conversation = Conversation::open(to)?;
    let mut buffer = vec![0; traffic::CHUNK];
    for line in std::io::stdin().lines() {
        let line = line?;
        let (letter, count) = line.split_once(' ').context("a letter and a count")?;
        let ask = match letter {
            "P" => Ask::Put,
            "G" => Ask::Get,
            "T" => Ask::Transact,
            _ => bail!("no such request: {letter}"),
        };
        crate::say(&conversation.ask(ask, count.parse()?, &mut buffer)?.as_nanos().to_string())?;
    }
    Ok(true)
}

/// What the server's process does.
pub(crate) fn serve(at: SocketAddr) -> Result<bool> {
    traffic::serve(at).map(|()| true)
}
