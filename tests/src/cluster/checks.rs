//! Owns the checks, in the order of a first day: audit, enforce, what operators do, who is kept out, where the control plane may not go.
//! Called by `main`.
//! Must never take an outcome for right by its appearance alone: a denial has its event and its reason, a transfer its checksum.

mod direct;
pub(crate) mod drop_in;
mod edge;
mod edits;
mod facts;
mod operators;
mod refused;
mod services;
mod two;
mod undo;
mod updates;

use anyhow::{Result, ensure};

use crate::{
    addresses::at,
    control::{Control, Egress, STRATEGIES},
    install::{Cluster, policy},
    kubectl::Stream,
    node::Node,
    pki::Pki,
    table::Table,
};

/// Every check.
pub(crate) fn all(
    cluster: &Cluster<'_>,
    control: &mut Control,
    node: &mut Node,
    pki: &Pki,
    table: &mut Table,
) -> Result<()> {
    let unhealthy = direct::failed_probes(cluster)?;
    audit(cluster, table)?;
    cluster.enforce(&policy("Enforce"))?;
    let before = cluster.place.refused_by_filter()?;
    for egress in [Egress::Grpc, Egress::HttpConnect] {
        if egress == Egress::HttpConnect {
            control.change_front(cluster.place, pki, egress, STRATEGIES)?;
            cluster.tunnel_up()?;
        }
        operators::proxies(cluster, egress, table)?;
        for stream in [Stream::WebSocket, Stream::Spdy] {
            operators::streams(cluster, egress, stream, table)?;
            operators::crowd(cluster, egress, stream, table)?;
        }
        refused::dials(cluster, egress, table)?;
        services::all(cluster, pki, egress, table)?;
    }
    table.check("control plane", "new connections past the tunnel", "packet filter", "0 packets", || {
        Ok(format!("{} packets", cluster.place.refused_by_filter()? - before))
    })?;
    direct::attempts(cluster, table)?;
    direct::edited(cluster, table)?;
    direct::probes(cluster, unhealthy, table)?;
    edits::edits(cluster, node, table)?;
    edge::tier(cluster, table)?;
    facts::found(cluster, table)?;
    updates::replaced(cluster, node, table)?;
    two::nodes(cluster, control, pki, table)?;
    undo::undo(cluster, node, table)?;
    control.check()?;
    node.check()
}

/// The main job alone: what an operator sees on the first day, within a minute or two.
pub(crate) fn demo(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    audit(cluster, table)?;
    cluster.enforce(&policy("Enforce"))?;
    operators::proxies(cluster, Egress::Grpc, table)?;
    operators::streams(cluster, Egress::Grpc, Stream::WebSocket, table)?;
    refused::dials(cluster, Egress::Grpc, table)?;
    direct::attempts(cluster, table)
}

/// The policy as deploy/ has it: nothing is denied, and it shows who would be.
fn audit(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    table.check(
        "neighbour host",
        "kubelet's port, policy as in deploy/ (Audit)",
        "direct",
        "connected, reported",
        || {
            let since = std::time::SystemTime::now();
            ensure!(
                direct::connects(cluster, crate::place::Where::Neighbour, at().neighbour, (at().node, 10250))?,
                "no answer"
            );
            direct::reported(cluster, since, at().neighbour, at().node, 10250, "no-selector")?;
            Ok("connected, reported".to_owned())
        },
    )
}
