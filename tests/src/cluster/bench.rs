//! Owns what the guard costs a cluster: exec and logs beside the upstream agent and beside no tunnel at all, traffic between pods.
//! Called by `main` for `bench`.
//! Must never compare figures of two clusters: whoever is compared serves the same node in the same minute, in turns.

mod fronts;
mod pods;
mod requests;

use std::time::Duration;

use anyhow::Result;
use lab::{
    bench::{Row, print, progress},
    process::until,
};
pub(crate) use pods::{converse, serve};

use crate::{
    addresses::{Addresses, at},
    control::{Control, Egress, PATIENCE},
    install::{self, Cluster},
    kubectl::Kubectl,
    node::{self, Node},
    pki::Pki,
    place::{Place, Where},
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amount {
    /// Execs and logs by each way.
    requests: usize,
    /// Rounds of traffic between pods.
    rounds: usize,
}

/// Pods without probes: what kubelet does each second would be measured with them.
const PODS: &str = "apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: web, image: 'localhost/busybox:lab', imagePullPolicy: Never, command: [sleep, '1000000']}]
---
apiVersion: v1
kind: Pod
metadata: {name: bystander}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: sh, image: 'localhost/busybox:lab', imagePullPolicy: Never, command: [sh, -c, 'echo a line; exec sleep 1000000']}]
";

/// Everybody who is compared is admitted: the upstream agent as one of the node, the API server by its address.
fn policy() -> String {
    let Addresses { control, whole, pods, .. } = at();
    format!(
        "apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata:
  name: nodes
spec:
  mode: Enforce
  guard:
    - name: kubelet
      node: {{ports: [10250]}}
      allow:
        - tunnel: {{}}
        - node: {{}}
        - ipBlock: {{cidr: '{control}/{whole}'}}
    - name: web
      pods: {{cidrs: ['{pods}'], ports: [{}, {}]}}
      allow:
        - ipBlock: {{cidr: '{pods}'}}
  tunnel:
    dial:
      - node: {{ports: [10250]}}
",
        pods::GUARDED,
        pods::GUARDED + 1,
    )
}

/// Measures all of it and prints the rows.
pub(crate) fn bench(quick: bool) -> Result<bool> {
    let amount = if quick { Amount { requests: 20, rounds: 2 } } else { Amount { requests: 200, rounds: 40 } };
    let place = Place::new()?;
    let pki = Pki::new(&place)?;
    let mut control = Control::start(&place, &pki, Egress::Grpc)?;
    let mut node = Node::start(&place, &pki, Where::Node, &install::images(&[fronts::IMAGE])?)?;
    let kubectl = Kubectl::new(&place, &pki)?;
    let cluster = Cluster { place: &place, kubectl: &kubectl };
    cluster.access()?;
    cluster.node_ready(node::NAME, &mut node)?;
    cluster.install_guard()?;
    cluster.pods(PODS)?;
    cluster.enforce(&policy())?;
    progress("the cluster stands, the guard enforces");
    let rows = measure(&cluster, &mut control, &pki, amount);
    let rows = rows.and_then(|rows| {
        control.check()?;
        node.check()?;
        Ok(rows)
    });
    match rows {
        Ok(rows) => print(&rows).map(|()| true),
        Err(error) => {
            crate::keep_logs(&place)?;
            Err(error)
        }
    }
}

fn measure(cluster: &Cluster<'_>, control: &mut Control, pki: &Pki, amount: Amount) -> Result<Vec<Row>> {
    let mut rows = pods::measure(cluster, amount)?;
    fronts::start(cluster, control, pki)?;
    let ways = [("guard", 6443), ("upstream agent", fronts::UPSTREAM), ("no tunnel", fronts::DIRECT)];
    let client = requests::Client::new(pki)?;
    let measured = cluster.place.run(Where::Control, || {
        for (name, port) in ways {
            until(&format!("exec works: {name}"), PATIENCE, || {
                std::thread::sleep(Duration::from_millis(200));
                Ok(client.exec(port).is_ok())
            })?;
        }
        requests::measure(&client, ways.map(|(_, port)| port), amount)
    });
    rows.extend(measured?);
    Ok(rows)
}
