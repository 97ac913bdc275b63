//! Owns what becomes of everybody while the guard's pod is replaced: a rolling update, a kill, a delete.
//! Called by `checks`.
//! Must never let a gap pass: one admitted attempt is a failure, whenever it was.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::Stdio,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    install::Cluster,
    kubectl::Stream,
    place::{NODE, Where},
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

/// Each of them, under load.
pub(crate) fn replaced(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    for (way, what) in [
        (Way::Rollout, "rolling update of the DaemonSet"),
        (Way::Kill, "kill -9 of the guard"),
        (Way::Delete, "delete of the guard's pod"),
    ] {
        let expected = format!("0 of {ATTEMPTS} direct admitted");
        table.check("everybody", what, "under load", &expected, || under_load(cluster, way))?;
    }
    Ok(())
}

fn under_load(cluster: &Cluster<'_>, way: Way) -> Result<String> {
    let kubelet: SocketAddr = format!("{NODE}:10250").parse()?;
    let before = container(cluster)?.context("the guard has no running container")?;
    let mut log = cluster.kubectl.command(Stream::WebSocket, &["logs", "-f", "web", "-c", "ticks", "--tail=1"])?;
    let mut log = log.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // It is open once a line came; what comes later stays in the pipe, which holds minutes of it.
    let mut lines = BufReader::new(log.stdout.take().context("stdout")?);
    lines.read_line(&mut String::new())?;
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
    let said = how_it_ended(&mut log)?;
    let ((admitted, count), outcomes, after) = outcome?;
    ensure!(after < Duration::from_secs(2) + SLOW, "the first exec of the new pod took {after:?}");
    let good = outcomes.iter().filter(|good| **good).count();
    Ok(format!(
        "{admitted} of {ATTEMPTS} direct admitted ({count} made in {:.0?}; {good} of {} execs answered meanwhile; first exec {after:.1?} after ready; logs -f: {said})",
        started.elapsed(),
        outcomes.len(),
    ))
}

/// What kubectl itself takes here, when many others work on the machine.
const SLOW: Duration = Duration::from_secs(3);

fn answers(cluster: &Cluster<'_>) -> Result<()> {
    let exec = ["exec", "web", "-c", "web", "--", "echo", "here"];
    let said = cluster.kubectl.all(Stream::WebSocket, &exec, Vec::new(), Duration::from_secs(40))?;
    ensure!(said.code == 0 && said.text() == "here\n", "{}", said.error.trim());
    Ok(())
}

/// Whether the stream that was open goes on, or with which words it ended.
fn how_it_ended(log: &mut std::process::Child) -> Result<String> {
    let mut error = log.stderr.take().context("stderr")?;
    let ended = log.try_wait()?;
    if ended.is_none() {
        log.kill()?;
        log.wait()?;
    }
    let mut text = String::new();
    std::io::Read::read_to_string(&mut error, &mut text)?;
    Ok(match ended {
        None => "went on".to_owned(),
        Some(status) => format!("ended, {status}, {:?}", text.trim()),
    })
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
