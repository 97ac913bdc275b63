//! Owns the checks, in the order of a first day: audit, enforce, what operators do, who is kept out, where the control plane may not go.
//! Called by `main`.
//! Must never take an outcome for right by its appearance alone: a denial has its event and its reason, a transfer its checksum.

use std::time::SystemTime;

use anyhow::{Result, ensure};
use lab::cluster::{Cluster, Egress, Front, Stream, Table, at, policy};

use crate::{direct, edge, edits, facts, operators, refused, services, two, undo, updates};

/// The image of the pod that serves a webhook and an aggregated API.
pub(crate) const HOOK: &str = "hook.tar";

/// Every check.
pub(crate) fn all(cluster: &mut Cluster, table: &mut Table) -> Result<()> {
    let unhealthy = direct::failed_probes(cluster)?;
    audit(cluster, table)?;
    cluster.enforce(&policy())?;
    let before = cluster.place.refused_by_filter()?;
    for egress in [Egress::Grpc, Egress::HttpConnect] {
        if egress == Egress::HttpConnect {
            cluster.control.change_front(Front::own(egress))?;
            cluster.tunnel_up()?;
        }
        operators::proxies(cluster, egress, table)?;
        for stream in [Stream::WebSocket, Stream::Spdy] {
            operators::streams(cluster, egress, stream, table)?;
            operators::crowd(cluster, egress, stream, table)?;
        }
        refused::dials(cluster, egress, table)?;
        services::all(cluster, egress, table)?;
    }
    table.check("control plane", "new connections past the tunnel", "packet filter", "0 packets", || {
        Ok(format!("{} packets", cluster.place.refused_by_filter()? - before))
    })?;
    direct::attempts(cluster, table)?;
    direct::edited(cluster, table)?;
    direct::probes(cluster, unhealthy, table)?;
    edits::edits(cluster, table)?;
    edge::tier(cluster, table)?;
    facts::found(cluster, table)?;
    updates::replaced(cluster, table)?;
    two::nodes(cluster, table)?;
    undo::undo(cluster, table)?;
    cluster.check()
}

/// The main job alone: what an operator sees on the first day, within a minute or two.
pub(crate) fn demo(cluster: &Cluster, table: &mut Table) -> Result<()> {
    audit(cluster, table)?;
    cluster.enforce(&policy())?;
    operators::proxies(cluster, Egress::Grpc, table)?;
    operators::streams(cluster, Egress::Grpc, Stream::WebSocket, table)?;
    refused::dials(cluster, Egress::Grpc, table)?;
    direct::attempts(cluster, table)
}

/// The policy as deploy/ has it: nothing is denied, and the guard shows who would be.
fn audit(cluster: &Cluster, table: &mut Table) -> Result<()> {
    let (what, expected) = ("kubelet's port, policy as in deploy/ (Audit)", "connected, reported");
    table.holds("neighbour host", what, "direct", expected, || {
        let since = SystemTime::now();
        ensure!(cluster.kubelet_answers(at().neighbour)?, "no answer");
        cluster.reports(since, at().neighbour, (at().node, 10250), "no-selector")
    })
}
