//! Owns the dials that the policy does not name: refused, with the reason in what kubectl prints and in the audit line.
//! Called by `checks`.
//! Must never count any other failure as a refusal.

use anyhow::{Result, ensure};
use lab::cluster::{Cluster, Egress, NAME, Table, at};
use serde_json::json;

/// Ports and addresses outside `tunnel.dial`.
pub(crate) fn dials(cluster: &Cluster, egress: Egress, table: &mut Table) -> Result<()> {
    // Nodes that do not exist: their addresses are another host's, or a name that means something else on the node.
    for (name, kind, address) in [
        ("elsewhere", "InternalIP", at().neighbour),
        ("metadata", "Hostname", "metadata.lab"),
        ("loopback", "Hostname", "loopback.lab"),
    ] {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        cluster.apply(&node.to_string())?;
        let status = json!({"status": {
            "addresses": [{"type": kind, "address": address}], "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        }});
        let patch = cluster.kubectl(&format!("patch node {name} --subresource=status --type=merge -p"));
        patch.word(status.to_string()).run()?;
    }
    let other_ports = "tunnel.dial names this address with other ports only";
    for (what, path, words, reason) in [
        ("pods/proxy to a port that is not named", "namespaces/default/pods/web:8081", other_ports, "port-not-named"),
        ("nodes/proxy to a port that is not named", &*format!("nodes/{NAME}:10256"), other_ports, "port-not-named"),
        ("a Node with another host's address", "nodes/elsewhere", "--proxy-strategies=destHost", "another-node"),
        (
            "a Node's name that is 169.254.169.254 there",
            "nodes/metadata",
            "link-local addresses are not dialled",
            "link-local",
        ),
        ("a Node's name that is loopback there", "nodes/loopback", "loopback addresses are not dialled", "loopback"),
    ] {
        table.holds("kubectl", what, egress, &format!("refused, {reason}"), || {
            let said = cluster.kubectl(&format!("get --raw /api/v1/{path}/proxy/healthz")).said()?;
            ensure!(said.code != 0, "it was answered: {}", said.text());
            ensure!(said.error.contains(shown(egress, words)), "kubectl says {:?}", said.error.trim());
            ensure!(cluster.log(200)?.lines().any(|line| line.contains(reason)), "the audit line is not in the log");
            Ok(())
        })?;
    }
    Ok(())
}

/// What a user sees of the words of a refusal. Over HTTP-Connect the API server shows the status line alone; the reason was in the body.
pub(crate) fn shown(egress: Egress, words: &str) -> &str {
    if egress == Egress::Grpc { words } else { "502 Bad Gateway" }
}
