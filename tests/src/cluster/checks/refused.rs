//! Owns the dials that the policy does not name: refused, with the reason in what kubectl prints and in the audit line.
//! Called by `checks`.
//! Must never count any other failure as a refusal.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{addresses::at, control::Egress, install::Cluster, kubectl::Stream, node::NAME, table::Table};

/// A dial that has to be refused: what an operator asks for, what kubectl has to print, the reason in the audit line.
struct Dial {
    what: &'static str,
    path: String,
    words: &'static str,
    reason: &'static str,
}

/// Nodes that are none: their addresses are another host's, or a name that means something else on the node.
fn nodes() -> [(&'static str, &'static str, &'static str); 3] {
    [
        ("elsewhere", "InternalIP", at().neighbour),
        ("metadata", "Hostname", "metadata.lab"),
        ("loopback", "Hostname", "loopback.lab"),
    ]
}

/// Ports and addresses outside `tunnel.dial`.
pub(crate) fn dials(cluster: &Cluster<'_>, egress: Egress, table: &mut Table) -> Result<()> {
    for (name, kind, address) in nodes() {
        let node = serde_json::json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        cluster.kubectl.apply(&node.to_string())?;
        let status = serde_json::json!({"status": {
            "addresses": [{"type": kind, "address": address}], "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        }});
        cluster.kubectl.run(&[
            "patch",
            "node",
            name,
            "--subresource=status",
            "--type=merge",
            "-p",
            &status.to_string(),
        ])?;
    }
    let other_ports = "tunnel.dial names this address with other ports only";
    let of_node = |node: &str| format!("/api/v1/nodes/{node}/proxy/healthz");
    let dials = [
        Dial {
            what: "pods/proxy to a port that is not named",
            path: "/api/v1/namespaces/default/pods/web:8081/proxy/".to_owned(),
            words: other_ports,
            reason: "port-not-named",
        },
        Dial {
            what: "nodes/proxy to a port that is not named",
            path: format!("/api/v1/nodes/{NAME}:10256/proxy/"),
            words: other_ports,
            reason: "port-not-named",
        },
        Dial {
            what: "a Node with another host's address",
            path: of_node("elsewhere"),
            words: "--proxy-strategies=destHost",
            reason: "another-node",
        },
        Dial {
            what: "a Node's name that is 169.254.169.254 there",
            path: of_node("metadata"),
            words: "link-local addresses are not dialled",
            reason: "link-local",
        },
        Dial {
            what: "a Node's name that is loopback there",
            path: of_node("loopback"),
            words: "loopback addresses are not dialled",
            reason: "loopback",
        },
    ];
    for Dial { what, path, words, reason } in dials {
        table.check("kubectl", what, egress, &format!("refused, {reason}"), || {
            let said = cluster.kubectl.all(
                Stream::WebSocket,
                &["get", "--raw", &path],
                Vec::new(),
                Duration::from_secs(60),
            )?;
            ensure!(said.code != 0, "it was answered: {}", said.text());
            // Over HTTP-Connect the API server shows its user the status line alone; the reason was in the body.
            let shown = if egress == Egress::Grpc { words } else { "502 Bad Gateway" };
            ensure!(said.error.contains(shown), "kubectl says {:?}", said.error.trim());
            let log = cluster.kubectl.run(&["-n", "kube-system", "logs", "daemonset/nodeguard", "--tail=200"])?;
            ensure!(log.lines().any(|line| line.contains(reason)), "the audit line is not in the log");
            Ok(format!("refused, {reason}"))
        })?;
    }
    Ok(())
}
