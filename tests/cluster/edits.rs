//! Owns edits of the policy as operators make them: in the ConfigMap, which kubelet brings to the node.
//! Called by `checks`.
//! Must never measure kubelet's own delay: the clock starts when the symlink has been swapped.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use lab::cluster::{Cluster, LABEL, Table, at, eventually, policy, time};
use serde_json::Value;

use crate::direct::on_node;

const EDITS: usize = 10;

/// Good edits and a broken one.
pub(crate) fn edits(cluster: &Cluster, table: &mut Table) -> Result<()> {
    table.check("operator", "10 edits of the ConfigMap", "symlink swap to in force", "median <= 100 ms", || {
        let mut delays = (0..EDITS).map(|number| one_edit(cluster, number)).collect::<Result<Vec<_>>>()?;
        delays.sort_unstable();
        let (median, longest) = (delays[EDITS / 2], delays[EDITS - 1]);
        let goal = if median <= Duration::from_millis(100) { "median <= 100 ms" } else { "median longer" };
        Ok(format!("{goal} (median {median:.0?}, longest {longest:.0?})"))
    })?;
    table.holds("operator", "a broken edit", "status, logs, readiness", "told, nothing changed", || broken(cluster))
}

/// From the swap that kubelet made to the line that the guard wrote.
fn one_edit(cluster: &Cluster, number: usize) -> Result<Duration> {
    let pod = cluster.system(&format!("get pods -l {LABEL} -o jsonpath={{.items[0].metadata.uid}}")).run()?;
    let link = cluster.node.volumes(&pod).join("kubernetes.io~configmap/policy/..data");
    let (before, epoch) = (swapped(&link)?, cluster.epoch()?);
    // Another port each time: a ruleset that means the same is no new one.
    cluster.set_policy(&policy().replace("ports: [10250]", &format!("ports: [10250, {}]", 20000 + number)))?;
    let mut since = None;
    eventually("the edit is in force", || {
        since = cluster.log(100)?.lines().find_map(|line| in_force(line, epoch));
        Ok(since.is_some())
    })?;
    let swap = swapped(&link)?;
    ensure!(swap != before, "the symlink was not swapped");
    Ok(since.context("in force")?.duration_since(swap).unwrap_or_default())
}

/// When the symlink came to be what it is. A ConfigMap's volume is on the disk, not on a file system of the node alone.
fn swapped(link: &Path) -> Result<SystemTime> {
    let about = fs::symlink_metadata(link).with_context(|| link.display().to_string())?;
    Ok(UNIX_EPOCH + Duration::new(u64::try_from(about.ctime())?, u32::try_from(about.ctime_nsec())?))
}

/// When this line says that a ruleset after this one came into force.
fn in_force(line: &str, after: u64) -> Option<SystemTime> {
    let line: Value = serde_json::from_str(line).ok()?;
    let newer = line["message"] == "in force" && line["epoch"].as_u64()? > after;
    time(&line["timestamp"]).filter(|_| newer)
}

fn broken(cluster: &Cluster) -> Result<()> {
    let epoch = cluster.epoch()?;
    cluster.set_policy(&policy().replace("spec:", "spec:\n  unknown: true"))?;
    let mut told = None;
    eventually("the status reports the broken edit", || {
        told = cluster.status()?.policy.last_error;
        Ok(told.as_ref().is_some_and(|error| !error.is_empty()))
    })?;
    ensure!(told.as_ref().is_some_and(|error| error.contains("unknown")), "the status says {told:?}");
    let log = cluster.log(50)?;
    ensure!(log.contains("the edit is rejected"), "kubectl logs does not report it");
    ensure!(log.contains("policy.yaml:"), "kubectl logs names no line");
    // As one asks on the node: the port is on loopback alone.
    let detail = on_node(cluster, "wget -q -O - http://127.0.0.1:8093/readyz?verbose")?.good()?.text();
    let told = |line: &str| line.starts_with("[!]policy-edit not in force") && line.contains("policy.yaml:");
    ensure!(detail.lines().any(told), "the readiness detail is {detail:?}");
    ensure!(detail.ends_with("check passed\n"), "a broken edit made the guard unready: {detail:?}");
    ensure!(cluster.epoch()? == epoch, "another ruleset is in force");
    ensure!(!cluster.kubelet_answers(at().neighbour)?, "kubelet's port is open");
    cluster.set_policy(&policy())?;
    eventually("the good edit after it is taken", || Ok(cluster.status()?.policy.last_error.is_none()))
}
