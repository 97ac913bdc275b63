//! Owns the second node: each guard serves its own node, and where a server chooses agents by chance, the refusal says how to mend that.
//! Called by `checks`, last but for `undo`: from here on the DaemonSet has two pods.
//! Must never leave it to chance which guard answered.

use anyhow::{Context, Result, ensure};
use lab::cluster::{Cluster, Egress, Front, LABEL, NAME, Node, SECOND_NAME, Table, Where, eventually, images};
use nodeguard::report::status::Status;

use crate::{checks::HOOK, operators::exec};

/// Execs that go to one of two agents by chance: all to the right one is less likely than one in 60,000.
const CHANCES: usize = 16;

/// Both nodes, by destHost and by chance.
pub(crate) fn nodes(cluster: &mut Cluster, table: &mut Table) -> Result<()> {
    if !table.wants("two nodes") {
        return Ok(());
    }
    let mut second = Node::start(&cluster.place, &cluster.pki, Where::Second, &images(&[HOOK])?)?;
    cluster.node_ready(SECOND_NAME)?;
    cluster.guard_ready()?;
    cluster.pod("second", include_str!("files/second-pod.yaml"))?;
    for (node, pod) in [(NAME, "web"), (SECOND_NAME, "second")] {
        let what = format!("exec, logs, nodes/proxy of {node}");
        table.holds("two nodes", &what, "destHost", "by its own guard", || {
            let before = admitted(cluster, node)?;
            exec(cluster, pod)?;
            cluster.kubectl(&format!("logs {pod} --all-containers --tail=1")).run()?;
            let health = cluster.kubectl(&format!("get --raw /api/v1/nodes/{node}/proxy/healthz")).run()?;
            ensure!(health == "ok", "healthz said {health}");
            // The exec is one, and asking is another.
            let more = admitted(cluster, node)? - before;
            ensure!(more >= 2, "{more} dials by the guard of {node}");
            Ok(())
        })?;
    }
    cluster.control.change_front(Front { strategies: "default", ..Front::own(Egress::Grpc) })?;
    cluster.tunnel_up()?;
    table.check("two nodes", "execs on worker-2", "default strategy", "some refused, flag named", || {
        let mut refused = 0;
        for _ in 0..CHANCES {
            if let Err(error) = exec(cluster, "second") {
                let said = format!("{error:#}");
                ensure!(said.contains("--proxy-strategies=destHost"), "{said}");
                refused += 1;
            }
        }
        ensure!(refused > 0 && refused < CHANCES, "{refused} refused, {} answered", CHANCES - refused);
        Ok(format!("some refused, flag named ({refused} of {CHANCES})"))
    })?;
    let (by, expected) = ("status of worker-1", "refused, another-node");
    table.holds("two nodes", "what the other guard says of it", by, expected, || {
        // By chance another guard may answer: asked until its own does.
        eventually("the guard of worker-1 reports it", || {
            let refused = status_of(cluster, NAME).map(|status| status.last_refused_dials).unwrap_or_default();
            Ok(refused.iter().any(|dial| dial.reason == "another-node"))
        })
    })?;
    cluster.control.change_front(Front::own(Egress::Grpc))?;
    second.process.check()
}

/// How many dials the guard of a node has admitted.
fn admitted(cluster: &Cluster, node: &str) -> Result<u64> {
    Ok(status_of(cluster, node)?.dials.context("no count of dials")?.admitted)
}

fn status_of(cluster: &Cluster, node: &str) -> Result<Status> {
    let on = format!("get pods -l {LABEL} --field-selector spec.nodeName={node}");
    cluster.status_of(&cluster.system(&format!("{on} -o jsonpath={{.items[0].metadata.name}}")).run()?)
}
