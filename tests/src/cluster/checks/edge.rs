//! Owns the edge tier as an operator turns it on: one line in the ConfigMap, with the rights that the DaemonSet has anyway.
//! Called by `checks`.
//! Must never count a denial of the listener's guard as one of the edge tier: the reasons differ.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use lab::process::until;

use super::direct::{connects, counted, reported};
use crate::{
    addresses::at,
    control::PATIENCE,
    install::{Cluster, policy},
    kubectl::Stream,
    place::Where,
    table::Table,
};

/// On, tried, and off again.
pub(crate) fn tier(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    if !table.wants("edge tier") {
        return Ok(());
    }
    table.check("edge tier", "on the node's uplink", "ConfigMap", "xdp on eth0", || {
        cluster.enforce(&(policy("Enforce") + "  edge: {interfaces: [eth0]}\n"))?;
        let mut found = String::new();
        let attached = until("the edge tier is attached", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(200));
            let status = cluster.status()?;
            let link = status.edge.first().context("the status names no interface")?;
            found = format!("{} on {} {}", link.hook, link.interface, link.note);
            Ok(link.attached)
        });
        attached.with_context(|| found.clone())?;
        Ok(found)
    })?;
    table.check("edge tier", "neighbour host to kubelet 10250", "direct", "denied, edge-no-selector", || {
        let (since, before) = (SystemTime::now(), counted(cluster, 10250, "edge-no-selector")?);
        if connects(cluster, Where::Neighbour, at().neighbour, (at().node, 10250))? {
            return Ok("connected".to_owned());
        }
        reported(cluster, since, at().neighbour, at().node, 10250, "edge-no-selector")?;
        let more = counted(cluster, 10250, "edge-no-selector")? - before;
        ensure!(more > 0, "the counter did not move");
        Ok(format!("denied, edge-no-selector ({more} packets counted)"))
    })?;
    table.check("edge tier", "scraper (ipBlock) to kubelet 10250", "direct", "connected", || {
        let answered = connects(cluster, Where::Neighbour, at().scraper, (at().node, 10250))?;
        Ok(if answered { "connected" } else { "no answer" }.to_owned())
    })?;
    table.check("edge tier", "exec, logs, pods/proxy 20 MB", "the tunnel", "answered", || {
        let exec = ["exec", "web", "-c", "web", "--", "echo", "here"];
        ensure!(cluster.kubectl.run(&exec)? == "here\n", "exec said something else");
        ensure!(!cluster.kubectl.run(&["logs", "web", "-c", "ticks", "--tail=1"])?.is_empty(), "no log");
        let path = "/api/v1/namespaces/default/pods/web:8080/proxy/bytes";
        let said = cluster.kubectl.all(Stream::WebSocket, &["get", "--raw", path], Vec::new(), PATIENCE)?;
        ensure!(said.code == 0 && said.out.len() == 20_000_000, "{} bytes, {}", said.out.len(), said.error);
        Ok("answered".to_owned())
    })?;
    table.check("edge tier", "off again", "ConfigMap", "no interface", || {
        cluster.enforce(&policy("Enforce"))?;
        until("the edge tier is gone", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(200));
            Ok(cluster.status()?.edge.is_empty())
        })?;
        Ok("no interface".to_owned())
    })
}
