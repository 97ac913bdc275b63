//! Owns edits of the policy as operators make them: in the ConfigMap, which kubelet brings to the node.
//! Called by `checks`.
//! Must never measure kubelet's own delay: the clock starts when the symlink has been swapped.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    addresses::at,
    checks::direct::connects,
    install::{Cluster, policy},
    kubectl::finish,
    node::Node,
    place::Where,
    table::Table,
};

const EDITS: usize = 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// Good edits and a broken one.
pub(crate) fn edits(cluster: &Cluster<'_>, node: &Node, table: &mut Table) -> Result<()> {
    table.check("operator", "10 edits of the ConfigMap", "symlink swap to in force", "median <= 100 ms", || {
        let mut delays = (0..EDITS).map(|number| one_edit(cluster, node, number)).collect::<Result<Vec<_>>>()?;
        delays.sort_unstable();
        let (median, longest) = (delays[EDITS / 2], delays[EDITS - 1]);
        let goal = if median <= Duration::from_millis(100) { "median <= 100 ms" } else { "median longer" };
        Ok(format!("{goal} (median {median:.0?}, longest {longest:.0?})"))
    })?;
    table.check("operator", "a broken edit", "status, logs, readiness", "told, nothing changed", || broken(cluster))
}

/// From the swap that kubelet made to the line that the guard wrote.
fn one_edit(cluster: &Cluster<'_>, node: &Node, number: usize) -> Result<Duration> {
    let label = [
        "-n",
        "kube-system",
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/name=nodeguard",
        "-o",
        "jsonpath={.items[0].metadata.uid}",
    ];
    let pod = cluster.kubectl.run(&label)?;
    let link = node.volumes(&pod).join("kubernetes.io~configmap/policy/..data");
    let before = swapped(&link)?;
    let epoch = cluster.epoch()?;
    // Another port each time: a ruleset that means the same is none.
    let text = policy("Enforce").replace("ports: [10250]", &format!("ports: [10250, {}]", 20000 + number));
    cluster.set_policy(&text)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = cluster.kubectl.run(&["-n", "kube-system", "logs", "daemonset/nodeguard", "--tail=100"])?;
        if let Some(time) = log.lines().filter_map(|line| in_force(line, epoch)).next() {
            let swap = swapped(&link)?;
            ensure!(swap != before, "the symlink was not swapped");
            return Ok(time.checked_sub(swap).unwrap_or_default());
        }
        if Instant::now() > deadline {
            bail!("the edit was not in force within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// When the symlink came to be what it is, since 1970. A ConfigMap's volume is on the disk, not on a file system of the node alone.
fn swapped(link: &Path) -> Result<Duration> {
    let about = fs::symlink_metadata(link).with_context(|| link.display().to_string())?;
    Ok(Duration::new(u64::try_from(about.ctime())?, u32::try_from(about.ctime_nsec())?))
}

/// When this line says that a ruleset after this one came into force.
fn in_force(line: &str, after: u64) -> Option<Duration> {
    let line: Value = serde_json::from_str(line).ok()?;
    if line.get("message")?.as_str()? != "in force" || line.get("epoch")?.as_u64()? <= after {
        return None;
    }
    since_1970(line.get("timestamp")?.as_str()?)
}

/// `2026-11-24T20:18:42.123456Z`.
pub(super) fn since_1970(time: &str) -> Option<Duration> {
    let (date, clock) = time.trim_end_matches('Z').split_once('T')?;
    let mut parts = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    // Days from the civil calendar: years that begin in March, so that the leap day is the last.
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let mut parts = clock.split(':');
    let (hours, minutes): (u64, u64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let seconds: f64 = parts.next()?.parse().ok()?;
    let whole = u64::try_from(days).ok()? * 86_400 + hours * 3600 + minutes * 60;
    Some(Duration::from_secs(whole) + Duration::from_secs_f64(seconds))
}

/// What the guard's readiness consists of, as one asks on the node: the port is on loopback alone.
fn readiness(cluster: &Cluster<'_>) -> Result<String> {
    let mut wget = cluster.place.command(Path::new("/bin/busybox"), Where::Node)?;
    wget.args(["wget", "-q", "-O", "-", "http://127.0.0.1:8093/readyz?verbose"]);
    let said = finish(&mut wget, Vec::new(), Duration::from_secs(20))?;
    ensure!(said.code == 0, "readyz: {}", said.error);
    Ok(said.text())
}

fn broken(cluster: &Cluster<'_>) -> Result<String> {
    let epoch = cluster.epoch()?;
    cluster.set_policy(&policy("Enforce").replace("spec:", "spec:\n  unknown: true"))?;
    let deadline = Instant::now() + PATIENCE;
    let told = loop {
        let error = cluster.status()?.policy.last_error.unwrap_or_default();
        if !error.is_empty() {
            break error;
        }
        ensure!(Instant::now() < deadline, "the status says nothing of it");
        std::thread::sleep(Duration::from_millis(300));
    };
    ensure!(told.contains("unknown"), "the status says {told:?}");
    let log = cluster.kubectl.run(&["-n", "kube-system", "logs", "daemonset/nodeguard", "--tail=50"])?;
    ensure!(log.contains("the edit is rejected"), "kubectl logs says nothing of it");
    ensure!(log.contains("policy.yaml:"), "kubectl logs names no line");
    let detail = readiness(cluster)?;
    let told = |line: &str| line.starts_with("[!]policy-edit not in force") && line.contains("policy.yaml:");
    ensure!(detail.lines().any(told), "the readiness detail is {detail:?}");
    ensure!(detail.ends_with("check passed\n"), "a broken edit made the guard unready: {detail:?}");
    ensure!(cluster.epoch()? == epoch, "another ruleset is in force");
    ensure!(!connects(cluster, Where::Neighbour, at().neighbour, (at().node, 10250))?, "kubelet's port is open");
    cluster.set_policy(&policy("Enforce"))?;
    let deadline = Instant::now() + PATIENCE;
    while cluster.status()?.policy.last_error.is_some() {
        ensure!(Instant::now() < deadline, "the good edit after it was not taken");
        std::thread::sleep(Duration::from_millis(300));
    }
    Ok("told, nothing changed".to_owned())
}
