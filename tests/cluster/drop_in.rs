//! Owns the drop-in: the upstream project's example manifest with nothing changed but image, command, server and account.
//! Called by `main`, before the guard is installed.
//! Must never give it a right or an argument that the example does not have.

use std::time::Duration;

use anyhow::Result;
use lab::{
    cluster::{Cluster, IMAGE, NAME, Table, filled},
    process::until,
};

/// Runs it alone, asks kubelet through it, and takes it away.
pub(crate) fn example(cluster: &Cluster, table: &mut Table) -> Result<()> {
    if !table.wants("drop-in") {
        return Ok(());
    }
    cluster.apply(&filled(include_str!("files/konnectivity-agent.yaml")).replace("<image>", IMAGE))?;
    let rollout = cluster.rolled_out("konnectivity-agent");
    table.holds("drop-in", "nodes/proxy healthz, logs of the agent", "upstream's example", "answered", || {
        rollout?;
        // It is ready without a tunnel: the example has no such probe. And kubelet serves its log only some time after its start.
        until("the tunnel is up", Duration::from_secs(30), || {
            let health = cluster.kubectl(&format!("get --raw /api/v1/nodes/{NAME}/proxy/healthz")).run();
            let log = cluster.system("logs daemonset/konnectivity-agent").run();
            Ok(health.is_ok_and(|said| said == "ok") && log.is_ok_and(|log| log.contains("tunnel connected")))
        })
    })?;
    cluster.system("delete daemonset konnectivity-agent").run()?;
    cluster.system("wait --for=delete pod -l k8s-app=konnectivity-agent --timeout=50s").run().map(drop)
}
