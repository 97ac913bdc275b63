//! Owns the direct attempts on guarded ports: who is kept out, with event and reason; who is let in; kubelet's probes.
//! Called by `checks`.
//! Must never count a broken helper as a denial: the kernel's own report has to name the attempt.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use lab::cluster::{Cluster, Said, Table, Where, at, finish, policy};
use serde_json::Value;

/// What is seen of an attempt that no denial is expected of.
pub(crate) fn seen(connected: bool) -> &'static str {
    if connected { "connected" } else { "no answer" }
}

/// Whether a connection opens from a pod: its own `nc`.
fn pod_connects(cluster: &Cluster, pod: &str, host: &str, port: u16) -> Result<bool> {
    let script = format!("nc -w 3 {host} {port} </dev/null >/dev/null 2>&1; echo ended $?");
    let said = cluster.kubectl(&format!("exec {pod}")).sh(script).run()?;
    match said.trim() {
        "ended 0" => Ok(true),
        "ended 1" => Ok(false),
        other => bail!("nc in {pod} said {other}"),
    }
}

/// Runs busybox in the node's cgroup and network namespace, outside any pod.
pub(crate) fn on_node(cluster: &Cluster, words: &str) -> Result<Said> {
    let mut command = cluster.place.command(Path::new("/bin/busybox"), Where::Node)?;
    finish(command.args(words.split(' ')), b"", Duration::from_secs(20))
}

/// Whether a connection opens from a process of the node.
fn node_process_connects(cluster: &Cluster, host: &str, port: u16) -> Result<bool> {
    let said = on_node(cluster, &format!("nc -w 3 {host} {port}"))?;
    match said.code {
        0 => Ok(true),
        1 => Ok(false),
        other => bail!("nc ended with {other}: {}", said.error),
    }
}

/// Everybody who is not the tunnel.
pub(crate) fn attempts(cluster: &Cluster, table: &mut Table) -> Result<()> {
    let (web, bystander) = (cluster.address("web")?, cluster.address("bystander")?);
    let (kubelet, local) = ((at().node, 10250), (at().loopback, 10250));
    let guarded = [("kubelet 10250", kubelet), ("web pod 8080", (&*web, 8080))];
    let mut denied = |who: &str, what: &str, source: &str, to: (&str, u16), attempt: &dyn Fn() -> Result<bool>| {
        table.check(who, what, "direct", "denied, no-selector", || cluster.judged(source, to, "no-selector", attempt))
    };
    for (who, from, source) in
        [("control plane", Where::Control, at().control_direct), ("neighbour host", Where::Neighbour, at().neighbour)]
    {
        for (what, to) in guarded {
            denied(who, what, source, to, &|| cluster.connects(from, source, to))?;
        }
    }
    for (what, to) in guarded {
        denied("another pod", what, &bystander, to, &|| pod_connects(cluster, "bystander", to.0, to.1))?;
    }
    denied("hostNetwork pod", "kubelet 10250", at().node, kubelet, &|| {
        pod_connects(cluster, "host", at().node, 10250)
    })?;
    for (what, to) in [("kubelet 10250", kubelet), ("kubelet 10250 on loopback", local)] {
        denied("process on the node", what, to.0, to, &|| node_process_connects(cluster, to.0, to.1))?;
    }
    let service = cluster.kubectl("get service web -o jsonpath={.spec.clusterIP}").run()?;
    denied("another pod", "web pod at its ClusterIP", &bystander, (&web, 8080), &|| {
        pod_connects(cluster, "bystander", &service, 80)
    })?;

    let mut let_in = |who: &str, what: &str, attempt: &dyn Fn() -> Result<bool>| {
        table.check(who, what, "direct", "connected", || attempt().map(seen))
    };
    let_in("scraper (ipBlock)", "kubelet 10250", &|| cluster.kubelet_answers(at().scraper))?;
    let_in("process on the node", "web pod 8080 (node: {})", &|| node_process_connects(cluster, &web, 8080))?;
    let_in("another pod", "web pod 8081, not guarded", &|| pod_connects(cluster, "bystander", &web, 8081))?;
    let api = at().api_service;
    let_in("another pod", "API server at its ClusterIP", &|| pod_connects(cluster, "bystander", api, 443))
}

/// What only an edit of the policy lets in, and where pods may not go.
pub(crate) fn edited(cluster: &Cluster, table: &mut Table) -> Result<()> {
    if !table.wants("scraper pod") && !table.wants("hub rule") {
        return Ok(());
    }
    let whole = at().whole;
    let scraper =
        format!("        - ipBlock: {{cidr: '{}/{whole}'}}\n    - name: web\n", cluster.address("bystander")?);
    let hub = format!("  controlPlane: {{addresses: ['{}/{whole}'], ports: [6443, 8132]}}\n", at().control);
    cluster.enforce(&(policy().replace("    - name: web\n", &scraper) + &hub))?;
    table.check("scraper pod", "kubelet 10250 (ipBlock)", "direct", "connected", || {
        pod_connects(cluster, "bystander", at().node, 10250).map(seen)
    })?;
    for (what, host, port, expected) in [
        ("API server at its ClusterIP", at().api_service, 443, "connected"),
        ("API server at its address", at().control, 6443, "connected"),
        ("etcd's port of the control plane", at().control, 2379, "not permitted"),
    ] {
        table.check("pod, hub rule", what, "direct", expected, || {
            let script = format!("nc -w 3 {host} {port} </dev/null 2>&1; echo ended $?");
            let said = cluster.kubectl("exec bystander").sh(script).run()?;
            Ok(match (said.contains("ended 0"), said.contains("Operation not permitted")) {
                (true, _) => "connected".to_owned(),
                (false, true) => "not permitted".to_owned(),
                (false, false) => said,
            })
        })?;
    }
    cluster.enforce(&policy())
}

/// Kubelet's own probes of a guarded pod port: HTTP, TCP and exec, every second. Some may have failed before its server listened.
pub(crate) fn probes(cluster: &Cluster, before: u64, table: &mut Table) -> Result<()> {
    let time = Duration::from_secs(lab::amount(20, 600));
    table.check("kubelet", "probes of a guarded port, each second", format!("{time:?}"), "no failure", || {
        std::thread::sleep(time);
        let failed = failed_probes(cluster)? - before;
        let pod = cluster.kubectl("get pod web -o json").json()?;
        let states = pod["status"]["containerStatuses"].as_array().context("no container states")?;
        let restarts: u64 = states.iter().filter_map(|state| state["restartCount"].as_u64()).sum();
        let ready = states.iter().all(|state| state["ready"] == true);
        Ok(match (failed, restarts, ready) {
            (0, 0, true) => "no failure".to_owned(),
            _ => format!("{failed} failed probes, {restarts} restarts, ready: {ready}"),
        })
    })
}

/// How many probes of the guarded pod have failed, ever.
pub(crate) fn failed_probes(cluster: &Cluster) -> Result<u64> {
    let unhealthy = "get events --field-selector=reason=Unhealthy,involvedObject.name=web -o json";
    let events: Value = cluster.kubectl(unhealthy).json()?;
    let events = events["items"].as_array().context("a list")?;
    Ok(events.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum())
}
