//! Owns the other ways to the node: the upstream agent behind a proxy-server of its own, and an API server that dials the node itself.
//! Called by the bench.
//! Must never carry a request of one way by another, nor give the upstream agent less of the machine than the guard has.

use anyhow::{Context, Result};

use crate::cluster::{
    Cluster,
    addresses::filled,
    control::{Egress, Front},
};

/// The port of the API server whose way is the upstream agent.
pub(super) const UPSTREAM: u16 = 6444;
/// That of the one that dials the node itself.
pub(super) const DIRECT: u16 = 6445;
/// The upstream agent's image.
pub(super) const IMAGE: &str = "proxy-agent.tar";

/// Starts both.
pub(super) fn start(cluster: &mut Cluster) -> Result<()> {
    let own = Front::own(Egress::Grpc);
    cluster.control.add(Front { port: UPSTREAM, agents: Some(8232), ..own })?;
    cluster.control.add(Front { port: DIRECT, agents: None, ..own })?;
    // The one that dials itself has to be let out.
    cluster.place.let_out(10250)?;
    cluster.apply(&filled(include_str!("../files/upstream-agent.yaml")))?;
    cluster.rolled_out("upstream-agent").context("the upstream agent")
}
