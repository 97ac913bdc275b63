//! Owns what becomes of everybody while the guard's pod is replaced: a rolling update, a kill, a delete.
//! Called by `checks`.
//! Must never let a gap pass: one admitted attempt is a failure, whenever it was.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStdout, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::edits::since_1970;
use crate::{
    addresses::{at, socket},
    install::Cluster,
    kubectl::Stream,
    node::{NAME, Node},
    place::Where,
    table::Table,
};

/// How a pod of the guard goes away.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// `kubectl rollout restart`.
    Rollout,
    /// `kill -9` of its process.
    Kill,
    /// `kubectl delete pod`.
    Delete,
}

const ATTEMPTS: usize = 1000;
const PATIENCE: Duration = Duration::from_secs(180);
/// How long after its pod is ready the guard may take to serve an exec, kubectl's own time included.
const WORKS: Duration = Duration::from_secs(2);

/// A stream: how it is called, over what, kubectl's words.
struct Open(&'static str, Stream, &'static [&'static str]);

const TICKS: &[&str] = &["exec", "web", "-c", "web", "--", "sh", "-c", "while sleep 0.2; do echo tick; done"];
/// What is open while the guard is replaced.
const STREAMS: [Open; 4] = [
    Open(
        "nodes/proxy",
        Stream::WebSocket,
        &["get", "--raw", "/api/v1/nodes/worker-1/proxy/containerLogs/default/web/ticks?follow=true&tailLines=1"],
    ),
    Open("logs -f", Stream::WebSocket, &["logs", "-f", "web", "-c", "ticks", "--tail=1"]),
    Open("exec over WebSocket", Stream::WebSocket, TICKS),
    Open("exec over SPDY", Stream::Spdy, TICKS),
];

/// What a replacement under load came to.
struct Seen {
    /// Of the direct attempts: how many were admitted, and how many were made.
    knocked: (usize, usize),
    /// Execs made meanwhile, one after the other, and whether each was answered.
    execs: Vec<bool>,
    /// From ready to the end of the first exec.
    first: Duration,
    /// How each of `STREAMS` ended.
    open: Vec<String>,
    /// While each of them was being opened, since 1970.
    asked: Vec<[Duration; 2]>,
    /// The dials that the guard which went away recorded as ended by its drain: when each was asked for.
    drained: Vec<Duration>,
    /// How many it said were open when the drain's time was over.
    over: Option<u64>,
    took: Duration,
}

/// Each of them, under load.
///
/// A `logs -f` or an exec over SPDY that is cut ends without a word, the exec even with exit code 0: kube-apiserver drops the error of a log that
/// breaks off (apiserver, StreamObject in responsewriters/writers.go), and to client-go the end of a SPDY connection is a success (remotecommand,
/// watchErrorStream). No agent can change that; its reason stands in the guard's record. What the API server passes on as it is, it tells of.
pub(crate) fn replaced(cluster: &Cluster<'_>, node: &Node, table: &mut Table) -> Result<()> {
    for (way, what) in [
        (Way::Rollout, "rolling update of the DaemonSet"),
        (Way::Kill, "kill -9 of the guard"),
        (Way::Delete, "delete of the guard's pod"),
    ] {
        let (expected, mut seen) = (format!("0 of {ATTEMPTS} direct admitted"), None);
        table.check("everybody", what, "under load", &expected, || {
            let now = under_load(cluster, node, way)?;
            let (admitted, count) = now.knocked;
            let good = now.execs.iter().filter(|good| **good).count();
            let text = format!(
                "{admitted} of {ATTEMPTS} direct admitted ({count} made in {:.0?}; {good} of {} execs answered meanwhile; first exec {:.1?} after ready)",
                now.took,
                now.execs.len(),
                now.first,
            );
            seen = Some(now);
            Ok(text)
        })?;
        let Some(seen) = seen else { continue };
        table.check("everybody", what, "nodes/proxy that was open", "ended with an error", || {
            Ok(seen.open.first().cloned().unwrap_or_default())
        })?;
        if !matches!(way, Way::Kill) {
            table.check("everybody", what, "what was open: audit lines", "drained", || recorded(cluster, &seen))?;
        }
    }
    Ok(())
}

/// Each dial that the drain ended has its record, and each stream a dial among these. An exec has a connection of its own. nodes/proxy and logs are
/// requests of the API server's one client for kubelet (kubelet/client, makeTransport): over HTTP/2 they share a connection, which may be older than
/// both. Kubelet v1.37 offers HTTP/1.1 alone (its GetConfigForClient returns a configuration that was cloned before net/http added h2 to it), and
/// each has its own.
fn recorded(cluster: &Cluster<'_>, seen: &Seen) -> Result<String> {
    let version = cluster.kubectl.run(&["get", "node", NAME, "-o", "jsonpath={.status.nodeInfo.kubeletVersion}"])?;
    let of_logs = if version.starts_with("v1.34.") { 1 } else { 2 };
    let mut rest = seen.drained.clone();
    for (Open(name, _, words), [began, ended]) in STREAMS.iter().zip(&seen.asked) {
        if words == &TICKS {
            let own = rest.extract_if(.., |asked| (*began..=*ended).contains(asked)).count();
            ensure!(own == 1, "{name}: {own} dials that were asked for then are recorded as ended by the drain");
        }
    }
    let of_execs = seen.drained.len() - rest.len();
    let logs = seen.asked.get(1).map(|[_, ended]| *ended).context("logs")?;
    // What was asked for later is of an exec that went on meanwhile and got no answer.
    let later = rest.extract_if(.., |asked| *asked > logs).count();
    let unanswered = seen.execs.iter().filter(|good| !**good).count();
    ensure!(
        later <= unanswered,
        "{later} dials more than those of the streams are recorded, {unanswered} execs went unanswered"
    );
    // More than these are connections that the API server keeps for later.
    ensure!(rest.len() >= of_logs, "nodes/proxy and logs: {} dials are recorded as ended by the drain", rest.len());
    ensure!(seen.over == Some(seen.drained.len() as u64), "{} records, {:?} were open", seen.drained.len(), seen.over);
    let ages: Vec<String> = rest.iter().map(|asked| format!("{:.1?}", logs.saturating_sub(*asked))).collect();
    let said = |each: (&Open, &String)| format!("{} {}", each.0.0, each.1);
    let all: Vec<String> = STREAMS.iter().zip(&seen.open).map(said).collect();
    Ok(format!(
        "drained ({of_execs} dials of the execs, {} of nodes/proxy and logs, opened {} before these, {later} later; {})",
        rest.len(),
        ages.join(" and "),
        all.join("; ")
    ))
}

fn under_load(cluster: &Cluster<'_>, node: &Node, way: Way) -> Result<Seen> {
    let kubelet = socket(at().node, 10250)?;
    let before = container(cluster)?.context("the guard has no running container")?;
    let record = record(node)?;
    let (mut held, mut asked) = (Vec::new(), Vec::new());
    for open in &STREAMS {
        let began = now()?;
        held.push(Held::open(cluster, open)?);
        asked.push([began, now()?]);
    }
    let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
    let started = Instant::now();
    let outcome = std::thread::scope(|scope| -> Result<_> {
        let knocker = scope.spawn(|| -> Result<(usize, usize)> {
            let (mut admitted, mut count) = (0, 0);
            // At least the whole number, and no end before the new pod works.
            while count < ATTEMPTS || !stop.load(Ordering::Relaxed) {
                made.store(0, Ordering::Relaxed);
                admitted += lab::client::knock(cluster.place.open(Where::Neighbour)?, kubelet, 100, &made)?;
                count += 100;
            }
            Ok((admitted, count))
        });
        let execs = scope.spawn(|| {
            let mut outcomes = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                outcomes.push(answers(cluster).is_ok());
            }
            outcomes
        });
        let replaced = replace(cluster, way, &before);
        let ready = Instant::now();
        let works = replaced.and_then(|()| answers(cluster));
        let after = ready.elapsed();
        stop.store(true, Ordering::Relaxed);
        let knocked = knocker.join().unwrap_or_else(|_| bail!("the attempts crashed"))?;
        let outcomes = execs.join().map_err(|_| anyhow::anyhow!("the execs crashed"))?;
        works.context("the first exec after the new pod was ready")?;
        Ok((knocked, outcomes, after))
    });
    let open = held.into_iter().map(Held::end).collect::<Result<Vec<_>>>()?;
    let (knocked, execs, first) = outcome?;
    ensure!(first < WORKS, "the first exec of the new pod took {first:?}");
    let lines = lines_of(record)?;
    let over = |line: &Value| {
        line["message"].as_str()?.starts_with("the drain's time is over").then(|| line["open"].as_u64())?
    };
    let drained =
        lines.iter().filter(|line| line["reason"] == "drained").map(|line| asked_at(line).context("its time"));
    let (drained, over) = (drained.collect::<Result<_>>()?, lines.iter().find_map(over));
    Ok(Seen { knocked, execs, first, open, asked, drained, over, took: started.elapsed() })
}

/// The files that the running guard's lines go to, held open: they are removed with the pod.
fn record(node: &Node) -> Result<Vec<File>> {
    let mut files = Vec::new();
    for pod in fs::read_dir(node.seen("/var/log/pods"))?.flatten() {
        let container = pod.path().join("nodeguard");
        for file in fs::read_dir(container).into_iter().flatten().flatten() {
            files.push(File::open(file.path())?);
        }
    }
    ensure!(!files.is_empty(), "the guard's container has no log");
    Ok(files)
}

/// The guard's lines in them.
fn lines_of(files: Vec<File>) -> Result<Vec<Value>> {
    let mut text = String::new();
    for mut file in files {
        file.read_to_string(&mut text)?;
    }
    let line = |line: &str| serde_json::from_str(line.get(line.find('{')?..)?).ok();
    Ok(text.lines().filter_map(line).collect())
}

/// When the dial of an audit line was asked for.
fn asked_at(line: &Value) -> Option<Duration> {
    since_1970(line["timestamp"].as_str()?)?.checked_sub(Duration::from_millis(line["milliseconds"].as_u64()?))
}

fn now() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

fn answers(cluster: &Cluster<'_>) -> Result<()> {
    let exec = ["exec", "web", "-c", "web", "--", "echo", "here"];
    let said = cluster.kubectl.all(Stream::WebSocket, &exec, Vec::new(), Duration::from_secs(40))?;
    ensure!(said.code == 0 && said.text() == "here\n", "{}", said.error.trim());
    Ok(())
}

/// A stream that stays open until somebody ends it.
struct Held {
    child: Child,
    /// What comes stays in the pipe, which holds minutes of it.
    _lines: BufReader<ChildStdout>,
}

impl Held {
    /// It is open once a line came.
    fn open(cluster: &Cluster<'_>, Open(_, stream, words): &Open) -> Result<Held> {
        let mut command = cluster.kubectl.command(*stream, words)?;
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("stdout")?);
        lines.read_line(&mut String::new())?;
        Ok(Held { child, _lines: lines })
    }

    /// Whether it goes on, or with which words it ended.
    fn end(mut self) -> Result<String> {
        let mut error = self.child.stderr.take().context("stderr")?;
        let ended = self.child.try_wait()?;
        if ended.is_none() {
            self.child.kill()?;
            self.child.wait()?;
        }
        let mut text = String::new();
        error.read_to_string(&mut text)?;
        let text = text.trim();
        Ok(match ended {
            None => "went on".to_owned(),
            Some(status) if status.success() || text.is_empty() => format!("ended without a word ({status})"),
            Some(status) => format!("ended with an error ({status}, {text:?})"),
        })
    }
}

/// Makes it go away and waits until another one is ready.
fn replace(cluster: &Cluster<'_>, way: Way, before: &str) -> Result<()> {
    match way {
        Way::Rollout => {
            drop(cluster.kubectl.run(&["-n", "kube-system", "rollout", "restart", "daemonset/nodeguard"])?)
        }
        Way::Delete => {
            let label = "app.kubernetes.io/name=nodeguard";
            drop(cluster.kubectl.run(&["-n", "kube-system", "delete", "pod", "--wait=false", "-l", label])?);
        }
        Way::Kill => kill(Pid::from_raw(guard_process(cluster)?), Signal::SIGKILL)?,
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        match container(cluster) {
            Ok(Some(now)) if now != before => return Ok(()),
            Ok(_) | Err(_) if Instant::now() > deadline => bail!("no new pod was ready within {PATIENCE:?}"),
            Ok(_) | Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// The container that is ready, by its id.
fn container(cluster: &Cluster<'_>) -> Result<Option<String>> {
    let pods = cluster.kubectl.run(&[
        "-n",
        "kube-system",
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/name=nodeguard",
        "-o",
        "json",
    ])?;
    let pods: Value = serde_json::from_str(&pods)?;
    let states = pods.get("items").and_then(Value::as_array).into_iter().flatten();
    let states =
        states.flat_map(|pod| pod.pointer("/status/containerStatuses").and_then(Value::as_array).into_iter().flatten());
    let mut ready = states.filter(|state| state.get("ready") == Some(&Value::Bool(true)));
    Ok(ready.find_map(|state| state.get("containerID")?.as_str().map(str::to_owned)))
}

/// The daemon's process: the one in this node's cgroup whose program is the image's.
fn guard_process(cluster: &Cluster<'_>) -> Result<i32> {
    let own = cluster.place.cgroup_name(Where::Node);
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if program.ends_with("usr/local/bin/nodeguard")
            && groups.contains(&own)
            && arguments.split(|byte| *byte == 0).any(|word| word == b"run")
        {
            return Ok(id);
        }
    }
    bail!("the guard has no process in this node")
}
