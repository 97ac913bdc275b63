//! Owns taking the guard out again, as docs/try-it.md says it: the DaemonSet first, which opens nothing, then the kernel half.
//! Called by `checks`, last of all: afterwards nothing is guarded.
//! Must never take an answer for open that the tunnel gave.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};

use super::direct::connects;
use crate::{
    addresses::at,
    control::PATIENCE,
    install::{Cluster, deployed},
    kubectl::{Stream, finish},
    node::{NAME, Node},
    place::Where,
    table::Table,
};

/// Deletes what deploy/ has, and removes the pins.
pub(crate) fn undo(cluster: &Cluster<'_>, node: &Node, table: &mut Table) -> Result<()> {
    if !table.wants("undo") {
        return Ok(());
    }
    let open = || connects(cluster, Where::Neighbour, at().neighbour, (at().node, 10250));
    table.check("undo", "kubectl delete -f daemonset.yaml", "direct", "still denied", || {
        let (words, manifest) = (["delete", "--timeout=100s", "-f", "-"], deployed("daemonset.yaml")?.into_bytes());
        let said = cluster.kubectl.all(Stream::WebSocket, &words, manifest, PATIENCE)?;
        ensure!(said.code == 0, "{}", said.error.trim());
        let on = format!("--field-selector=spec.nodeName={NAME}");
        let label = "app.kubernetes.io/name=nodeguard";
        let gone = ["-n", "kube-system", "wait", "--for=delete", "pod", "-l", label, &on, "--timeout=50s"];
        cluster.kubectl.run(&gone)?;
        Ok(if open()? { "connected" } else { "still denied" }.to_owned())
    })?;
    table.check("undo", "nodeguard unpin on the node", "direct", "connected", || {
        let binary = lab::lab::target()?.with_file_name("x86_64-unknown-linux-gnu").join("release/nodeguard");
        let mut unpin = cluster.place.command(Path::new("/usr/bin/nsenter"), Where::Node)?;
        unpin.arg(format!("--mount=/proc/{}/ns/mnt", node.id())).arg("--").arg(binary).arg("unpin");
        let said = finish(&mut unpin, Vec::new(), Duration::from_secs(30))?;
        ensure!(said.code == 0, "unpin: {} {}", said.text(), said.error);
        Ok(if open()? { "connected" } else { "no answer" }.to_owned())
    })
}
