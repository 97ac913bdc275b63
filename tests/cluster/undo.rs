//! Owns taking the guard out again, as docs/try-it.md says it: the DaemonSet first, which opens nothing, then the kernel half.
//! Called by `checks`, last of all: afterwards nothing is guarded.
//! Must never take an answer for open that the tunnel gave.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    cluster::{Cluster, LABEL, NAME, PATIENCE, Table, Where, at, deployed, finish, text},
    process::target,
};

use crate::direct::seen;

/// Deletes what deploy/ has, and removes the pins.
pub(crate) fn undo(cluster: &Cluster, table: &mut Table) -> Result<()> {
    if !table.wants("undo") {
        return Ok(());
    }
    table.check("undo", "kubectl delete -f daemonset.yaml", "direct", "still denied", || {
        let delete = format!("delete --timeout=100s -f {}", text(&deployed("daemonset.yaml"))?);
        cluster.kubectl(&delete).within(PATIENCE).run()?;
        let gone = format!("wait --for=delete pod -l {LABEL} --field-selector=spec.nodeName={NAME} --timeout=50s");
        cluster.system(&gone).run()?;
        Ok(if cluster.kubelet_answers(at().neighbour)? { "connected" } else { "still denied" })
    })?;
    table.check("undo", "nodeguard unpin on the node", "direct", "connected", || {
        let binary = target()?.with_file_name("x86_64-unknown-linux-gnu").join("release/nodeguard");
        let mut unpin = cluster.place.command(Path::new("/usr/bin/nsenter"), Where::Node)?;
        unpin.arg(format!("--mount=/proc/{}/ns/mnt", cluster.node.process.id())).arg("--").arg(binary).arg("unpin");
        let said = finish(&mut unpin, b"", Duration::from_secs(30))?;
        ensure!(said.code == 0, "unpin: {} {}", said.text(), said.error);
        cluster.kubelet_answers(at().neighbour).map(seen)
    })
}
