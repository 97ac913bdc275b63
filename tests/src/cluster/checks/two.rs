//! Owns the second node: each guard serves its own, and a server that chooses agents by chance is told how to mend that.
//! Called by `checks`, last: from here on the DaemonSet has two pods.
//! Must never leave it to chance which guard answered.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::process::until;
use serde_json::Value;

use crate::{
    control::{Control, Egress, PATIENCE, STRATEGIES},
    install::{Cluster, HOOK, images},
    kubectl::Stream,
    node::{NAME, Node, SECOND_NAME},
    pki::Pki,
    place::Where,
    table::Table,
};

const POD: &str = r#"apiVersion: v1
kind: Pod
metadata: {name: second}
spec:
  nodeName: worker-2
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: sh, image: 'localhost/busybox:lab', imagePullPolicy: Never, command: [sleep, '1000000']}]
"#;

/// Execs that go to one of two agents by chance: all to the right one is less likely than one in 60,000.
const CHANCES: usize = 16;

/// Both nodes, by destHost and by chance.
pub(crate) fn nodes(cluster: &Cluster<'_>, control: &mut Control, pki: &Pki, table: &mut Table) -> Result<()> {
    if !table.wants("two nodes") {
        return Ok(());
    }
    let mut second = Node::start(cluster.place, pki, Where::Second, &images(&[HOOK])?)?;
    cluster.node_ready(SECOND_NAME, &mut second)?;
    cluster.guard_ready()?;
    cluster.kubectl.apply(POD)?;
    cluster.kubectl.run(&["wait", "--for=condition=Ready", "pod/second", "--timeout=50s"])?;
    for (node, pod) in [(NAME, "web"), (SECOND_NAME, "second")] {
        table.check(
            "two nodes",
            &format!("exec, logs, nodes/proxy of {node}"),
            "destHost",
            "by its own guard",
            || {
                let before = admitted(cluster, node)?;
                exec(cluster, pod)?;
                cluster.kubectl.run(&["logs", pod, "--all-containers", "--tail=1"])?;
                let health = cluster.kubectl.run(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/healthz")])?;
                ensure!(health == "ok", "healthz said {health}");
                // The exec is one, and asking is another.
                let more = admitted(cluster, node)? - before;
                ensure!(more >= 2, "{more} dials by the guard of {node}");
                Ok("by its own guard".to_owned())
            },
        )?;
    }
    control.change_front(cluster.place, pki, Egress::Grpc, "default")?;
    cluster.tunnel_up()?;
    table.check("two nodes", "execs on worker-2", "default strategy", "some refused, flag named", || {
        let (mut refused, mut answered) = (0, 0);
        for _ in 0..CHANCES {
            match exec(cluster, "second") {
                Ok(()) => answered += 1,
                Err(error) => {
                    let said = format!("{error:#}");
                    ensure!(said.contains("--proxy-strategies=destHost"), "{said}");
                    refused += 1;
                }
            }
        }
        ensure!(refused > 0 && answered > 0, "{refused} refused, {answered} answered");
        Ok(format!("some refused, flag named ({refused} of {CHANCES})"))
    })?;
    table.check(
        "two nodes",
        "what the other guard says of it",
        "status of worker-1",
        "refused, another-node",
        || {
            // By chance another guard may answer: asked until its own does.
            until("the guard of worker-1 tells", PATIENCE, || {
                let status = status_of(cluster, NAME);
                let refused = status.ok().and_then(|status| status.get("lastRefusedDials")?.as_array().cloned());
                let reason = |dial: &Value| dial.get("reason").and_then(Value::as_str) == Some("another-node");
                Ok(refused.is_some_and(|refused| refused.iter().any(reason)))
            })?;
            Ok("refused, another-node".to_owned())
        },
    )?;
    control.change_front(cluster.place, pki, Egress::Grpc, STRATEGIES)?;
    second.check()
}

fn exec(cluster: &Cluster<'_>, pod: &str) -> Result<()> {
    let words = ["exec", pod, "--", "echo", "here"];
    let said = cluster.kubectl.all(Stream::WebSocket, &words, Vec::new(), Duration::from_secs(60))?;
    ensure!(said.code == 0 && said.text() == "here\n", "{}", said.error.trim());
    Ok(())
}

/// How many dials the guard of a node has admitted.
fn admitted(cluster: &Cluster<'_>, node: &str) -> Result<u64> {
    let status = status_of(cluster, node)?;
    let admitted = status.pointer("/dials/admitted").and_then(Value::as_u64);
    admitted.ok_or_else(|| anyhow::anyhow!("no count of dials in {}", status.get("dials").unwrap_or(&Value::Null)))
}

fn status_of(cluster: &Cluster<'_>, node: &str) -> Result<Value> {
    let label = "app.kubernetes.io/name=nodeguard";
    let on = format!("spec.nodeName={node}");
    let name = [
        "-n",
        "kube-system",
        "get",
        "pods",
        "-l",
        label,
        "--field-selector",
        &on,
        "-o",
        "jsonpath={.items[0].metadata.name}",
    ];
    let pod = cluster.kubectl.run(&name)?;
    let status = ["-n", "kube-system", "exec", &pod, "--", "nodeguard", "status", "-o", "json"];
    Ok(serde_json::from_str(&cluster.kubectl.run(&status)?)?)
}
