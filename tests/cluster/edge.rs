//! Owns the edge tier as an operator turns it on: one line in the ConfigMap, with the rights that the DaemonSet has anyway.
//! Called by `checks`.
//! Must never count a denial of the listener's guard as one of the edge tier: the reasons differ.

use anyhow::{Context, Result, ensure};
use lab::cluster::{Cluster, PATIENCE, Table, at, eventually, policy};

use crate::{direct::seen, operators::exec};

/// Turns it on, tries it, and turns it off again.
pub(crate) fn tier(cluster: &Cluster, table: &mut Table) -> Result<()> {
    if !table.wants("edge tier") {
        return Ok(());
    }
    table.check("edge tier", "on the node's uplink", "ConfigMap", "xdp on eth0", || {
        cluster.enforce(&(policy() + "  edge: {interfaces: [eth0]}\n"))?;
        let mut found = String::new();
        let attached = eventually("the edge tier is attached", || {
            let status = cluster.status()?;
            let link = status.edge.first().context("the status names no interface")?;
            found = format!("{} on {} {}", link.hook, link.interface, link.note);
            Ok(link.attached)
        });
        attached.with_context(|| found.clone())?;
        Ok(found)
    })?;
    table.check("edge tier", "neighbour host to kubelet 10250", "direct", "denied, edge-no-selector", || {
        let attempt = || cluster.kubelet_answers(at().neighbour);
        cluster.judged(at().neighbour, (at().node, 10250), "edge-no-selector", attempt)
    })?;
    table.check("edge tier", "scraper (ipBlock) to kubelet 10250", "direct", "connected", || {
        cluster.kubelet_answers(at().scraper).map(seen)
    })?;
    table.holds("edge tier", "exec, logs, pods/proxy 20 MB", "the tunnel", "answered", || {
        exec(cluster, "web -c web")?;
        ensure!(!cluster.kubectl("logs web -c ticks --tail=1").run()?.is_empty(), "no log");
        let bytes = "get --raw /api/v1/namespaces/default/pods/web:8080/proxy/bytes";
        let said = cluster.kubectl(bytes).within(PATIENCE).said()?.good()?;
        ensure!(said.out.len() == 20_000_000, "{} bytes, {}", said.out.len(), said.error);
        Ok(())
    })?;
    table.holds("edge tier", "off again", "ConfigMap", "no interface", || {
        cluster.enforce(&policy())?;
        eventually("the edge tier is gone", || Ok(cluster.status()?.edge.is_empty()))
    })
}
