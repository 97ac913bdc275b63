//! Owns what the guard finds out by itself where a policy leaves it out: the node's addresses, and which listeners are pods'.
//! Called by `checks`.
//! Must never let a guess pass as a fact: what was found is compared with what Kubernetes says.

use std::time::SystemTime;

use anyhow::{Result, ensure};

use super::direct::{connects, reported};
use crate::{
    addresses::at,
    install::{Cluster, policy},
    node::NAME,
    place::Where,
    table::Table,
};

/// Both.
pub(crate) fn found(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    if !table.wants("left out") {
        return Ok(());
    }
    table.check("left out", "the node's name and addresses", "status", "found", || {
        let status = cluster.status()?;
        let identifiers = status.tunnel.get("identifiers").map(ToString::to_string).unwrap_or_default();
        for fact in [NAME, at().node] {
            ensure!(identifiers.contains(fact), "no {fact} in {identifiers}");
        }
        Ok("found".to_owned())
    })?;
    let web = cluster.address("web")?;
    table.check("left out", "pods' cidrs in a rule: neighbour to web pod", "direct", "denied, no-selector", || {
        let cidrs = format!("pods: {{cidrs: ['{}'], ports: [8080]}}\n      allow", at().pods);
        let without = policy("Enforce").replace(&cidrs, "pods: {ports: [8080]}\n      allow");
        ensure!(without != policy("Enforce"), "the policy has no rule for pods");
        cluster.enforce(&without)?;
        let since = SystemTime::now();
        if connects(cluster, Where::Neighbour, at().neighbour, (&web, 8080))? {
            return Ok("connected".to_owned());
        }
        reported(cluster, since, at().neighbour, &web, 8080, "no-selector")?;
        let weakened = cluster.status()?.weakened;
        ensure!(!weakened.iter().any(|line| line.contains("cgroup of the pods")), "{weakened:?}");
        Ok("denied, no-selector".to_owned())
    })?;
    table.check("left out", "pods' cidrs in a rule: pods/proxy, probes", "the tunnel, node: {}", "answered", || {
        cluster.kubectl.run(&["get", "--raw", "/api/v1/namespaces/default/pods/web:8080/proxy/"])?;
        cluster.kubectl.run(&["wait", "--for=condition=Ready", "pod/web", "--timeout=20s"])?;
        Ok("answered".to_owned())
    })?;
    cluster.enforce(&policy("Enforce"))
}
