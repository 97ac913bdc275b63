//! Owns what becomes of everybody while the guard's pod is replaced: a rolling update, a kill, a delete.
//! Called by `checks`.
//! Must never let a gap pass: one admitted attempt is a failure, whenever it was.

use std::{
    fs::{self, File},
    io::Read,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use lab::cluster::{Cluster, LABEL, NAME, Reading, Stream, Table, Where, kubelet, time};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::operators::exec;

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

/// A stream: its name, its protocol, kubectl's words, and the script of an exec.
struct Open(&'static str, Stream, &'static str, Option<&'static str>);

const TICKS: Option<&str> = Some("while sleep 0.2; do echo tick; done");
const FOLLOWED: &str = "get --raw /api/v1/nodes/worker-1/proxy/containerLogs/default/web/ticks?follow=true&tailLines=1";
/// What is open while the guard is replaced.
const STREAMS: [Open; 4] = [
    Open("nodes/proxy", Stream::WebSocket, FOLLOWED, None),
    Open("logs -f", Stream::WebSocket, "logs -f web -c ticks --tail=1", None),
    Open("exec over WebSocket", Stream::WebSocket, "exec web -c web", TICKS),
    Open("exec over SPDY", Stream::Spdy, "exec web -c web", TICKS),
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
    /// While each of them was being opened.
    asked: Vec<[SystemTime; 2]>,
    /// The dials that the guard which went away recorded as ended by its drain: when each was asked for.
    drained: Vec<SystemTime>,
    /// How many it said were open when the drain's time was over.
    over: Option<u64>,
    took: Duration,
}

/// Each of them, under load.
///
/// A `logs -f` or an exec over SPDY that is cut ends without a word, the exec even with exit code 0: kube-apiserver drops the error of a log that
/// breaks off (apiserver, StreamObject in responsewriters/writers.go), and to client-go the end of a SPDY connection is a success (remotecommand,
/// watchErrorStream). No agent can change that; its reason stands in the guard's record. What the API server passes on as it is, it tells of.
pub(crate) fn replaced(cluster: &Cluster, table: &mut Table) -> Result<()> {
    for (way, what) in [
        (Way::Rollout, "rolling update of the DaemonSet"),
        (Way::Kill, "kill -9 of the guard"),
        (Way::Delete, "delete of the guard's pod"),
    ] {
        let (expected, mut seen) = (format!("0 of {ATTEMPTS} direct admitted"), None);
        table.check("everybody", what, "under load", &expected, || {
            let now = under_load(cluster, way)?;
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
fn recorded(cluster: &Cluster, seen: &Seen) -> Result<String> {
    let version = format!("get node {NAME} -o jsonpath={{.status.nodeInfo.kubeletVersion}}");
    let version = cluster.kubectl(&version).run()?;
    let of_logs = if version.starts_with("v1.34.") { 1 } else { 2 };
    let mut rest = seen.drained.clone();
    for (Open(name, .., script), [began, ended]) in STREAMS.iter().zip(&seen.asked) {
        if script.is_some() {
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
    let age = |asked: &SystemTime| format!("{:.1?}", logs.duration_since(*asked).unwrap_or_default());
    let ages: Vec<String> = rest.iter().map(age).collect();
    let said = |each: (&Open, &String)| format!("{} {}", each.0.0, each.1);
    let all: Vec<String> = STREAMS.iter().zip(&seen.open).map(said).collect();
    Ok(format!(
        "drained ({of_execs} dials of the execs, {} of nodes/proxy and logs, opened {} before these, {later} later; {})",
        rest.len(),
        ages.join(" and "),
        all.join("; ")
    ))
}

fn under_load(cluster: &Cluster, way: Way) -> Result<Seen> {
    let kubelet = kubelet()?;
    let before = container(cluster)?.context("the guard has no running container")?;
    let record = record(cluster)?;
    let (mut held, mut asked) = (Vec::new(), Vec::new());
    for open in &STREAMS {
        let began = SystemTime::now();
        held.push(held_open(cluster, open)?);
        asked.push([began, SystemTime::now()]);
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
                outcomes.push(exec(cluster, "web -c web").is_ok());
            }
            outcomes
        });
        let replaced = replace(cluster, way, &before);
        let ready = Instant::now();
        let works = replaced.and_then(|()| exec(cluster, "web -c web"));
        let after = ready.elapsed();
        stop.store(true, Ordering::Relaxed);
        let knocked = knocker.join().unwrap_or_else(|_| bail!("the attempts crashed"))?;
        let outcomes = execs.join().map_err(|_| anyhow::anyhow!("the execs crashed"))?;
        works.context("the first exec after the new pod was ready")?;
        Ok((knocked, outcomes, after))
    });
    let open = held.into_iter().map(Reading::end).collect::<Result<Vec<_>>>()?;
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
fn record(cluster: &Cluster) -> Result<Vec<File>> {
    let mut files = Vec::new();
    for pod in fs::read_dir(cluster.node.seen("/var/log/pods"))?.flatten() {
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
fn asked_at(line: &Value) -> Option<SystemTime> {
    time(&line["timestamp"])?.checked_sub(Duration::from_millis(line["milliseconds"].as_u64()?))
}

/// Opens a stream; it is open once a line came.
fn held_open(cluster: &Cluster, Open(_, stream, words, script): &Open) -> Result<Reading> {
    let call = cluster.kubectl(words).over(*stream);
    let mut held = if let Some(script) = script { call.sh(*script) } else { call }.open()?;
    held.lines.next().context("no line")??;
    Ok(held)
}

/// Makes it go away and waits until another one is ready.
fn replace(cluster: &Cluster, way: Way, before: &str) -> Result<()> {
    match way {
        Way::Rollout => drop(cluster.system("rollout restart daemonset/nodeguard").run()?),
        Way::Delete => drop(cluster.system(&format!("delete pod --wait=false -l {LABEL}")).run()?),
        Way::Kill => kill(Pid::from_raw(guard_process(cluster)?), Signal::SIGKILL)?,
    }
    // Polled often: how long the new pod takes to serve is measured from here.
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
fn container(cluster: &Cluster) -> Result<Option<String>> {
    let pods = cluster.system(&format!("get pods -l {LABEL} -o json")).json()?;
    let pods = pods["items"].as_array().into_iter().flatten();
    let mut states = pods.filter_map(|pod| pod["status"]["containerStatuses"].as_array()).flatten();
    Ok(states.find(|state| state["ready"] == true).and_then(|state| state["containerID"].as_str().map(str::to_owned)))
}

/// The daemon's process: the one in this node's cgroup whose program is the image's.
fn guard_process(cluster: &Cluster) -> Result<i32> {
    let process = cluster.place.process(Where::Node, |_, program, words| {
        program.ends_with("usr/local/bin/nodeguard") && words.contains(&"run")
    });
    let process = process.context("the guard")?;
    process.file_name().and_then(|id| id.to_str()?.parse().ok()).context("a process has a number")
}
