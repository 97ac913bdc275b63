//! Owns what the guard finds out by itself where a policy leaves it out: the node's addresses, and which listeners are pods'.
//! Called by `checks`.
//! Must never let a guess pass as a fact: what was found is compared with what Kubernetes says.

use std::time::SystemTime;

use anyhow::{Result, ensure};
use lab::cluster::{Cluster, NAME, Table, Where, at, policy};

/// Both.
pub(crate) fn found(cluster: &Cluster, table: &mut Table) -> Result<()> {
    if !table.wants("left out") {
        return Ok(());
    }
    table.holds("left out", "the node's name and addresses", "status", "found", || {
        let status = cluster.status()?;
        let identifiers = status.tunnel.map(|tunnel| tunnel.identifiers).unwrap_or_default();
        for fact in [NAME, at().node] {
            ensure!(identifiers.contains(fact), "no {fact} in {identifiers}");
        }
        Ok(())
    })?;
    let web = cluster.address("web")?;
    table.check("left out", "pods' cidrs in a rule: neighbour to web pod", "direct", "denied, no-selector", || {
        let cidrs = format!("pods: {{cidrs: ['{}'], ports: [8080]}}\n      allow", at().pods);
        let without = policy().replace(&cidrs, "pods: {ports: [8080]}\n      allow");
        ensure!(without != policy(), "the policy has no rule for pods");
        cluster.enforce(&without)?;
        let since = SystemTime::now();
        if cluster.connects(Where::Neighbour, at().neighbour, (&web, 8080))? {
            return Ok("connected");
        }
        cluster.reports(since, at().neighbour, (&web, 8080), "no-selector")?;
        let weakened = cluster.status()?.weakened;
        ensure!(!weakened.iter().any(|weakness| weakness.message.contains("cgroup of the pods")), "{weakened:?}");
        Ok("denied, no-selector")
    })?;
    table.holds("left out", "pods' cidrs in a rule: pods/proxy, probes", "the tunnel, node: {}", "answered", || {
        cluster.kubectl("get --raw /api/v1/namespaces/default/pods/web:8080/proxy/").run()?;
        cluster.kubectl("wait --for=condition=Ready pod/web --timeout=20s").run().map(drop)
    })?;
    cluster.enforce(&policy())
}
