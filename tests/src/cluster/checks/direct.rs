//! Owns the direct attempts on guarded ports: who is kept out, with event and reason; who is let in; kubelet's probes.
//! Called by `checks`.
//! Must never count a broken helper as a denial: the kernel's own report has to name the attempt.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use lab::client::timed_out;
use nodeguard::report::status::Counter;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::{
    addresses::{at, socket},
    checks::edits::since_1970,
    install::{Cluster, policy},
    place::Where,
    table::Table,
};

/// How long an attempt waits: on this machine a SYN-ACK takes milliseconds, however busy it is.
const SYN_ACK: Duration = Duration::from_secs(2);

/// Whether a connection opens from an address of a namespace.
pub(crate) fn connects(cluster: &Cluster<'_>, from: Where, source: &str, (host, port): (&str, u16)) -> Result<bool> {
    let (source, to) = (socket(source, 0)?, socket(host, port)?);
    cluster.place.run(from, || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&source.into())?;
        match socket.connect_timeout(&to.into(), SYN_ACK) {
            Ok(()) => Ok(true),
            Err(error) if timed_out(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    })
}

/// The same from a pod: its own `nc`.
fn pod_connects(cluster: &Cluster<'_>, pod: &str, host: &str, port: &str) -> Result<bool> {
    let exec =
        ["exec", pod, "--", "sh", "-c", &format!("nc -w 3 {host} {port} </dev/null >/dev/null 2>&1; echo ended $?")];
    let said = cluster.kubectl.run(&exec)?;
    match said.trim() {
        "ended 0" => Ok(true),
        "ended 1" => Ok(false),
        other => bail!("nc in {pod} said {other}"),
    }
}

/// Waits until the guard reports a denial of this, of now and not of an attempt before.
pub(crate) fn reported(
    cluster: &Cluster<'_>,
    since: SystemTime,
    source: &str,
    destination: &str,
    port: u16,
    reason: &str,
) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let status = cluster.status()?;
        let events = &status.last_denies;
        let is_it = |event: &Value| {
            let text = |name: &str| {
                event.get(name).map(|value| value.to_string().trim_matches('"').to_owned()).unwrap_or_default()
            };
            // An event's time is reckoned from two clocks that are read one after the other, on a busy machine some way apart.
            let told =
                since_1970(&text("time")).is_some_and(|time| UNIX_EPOCH + time + Duration::from_millis(100) >= since);
            let from = text("source").parse::<SocketAddr>().map(|source| source.ip().to_string()).unwrap_or_default();
            told && from == source
                && text("destination") == destination
                && text("port") == port.to_string()
                && text("reason") == reason
        };
        if events.iter().any(is_it) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("no event of {source} to {destination}:{port} for {reason}; the last is {:?}", events.last());
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// How many packets the rule of a port has denied for a reason.
pub(super) fn counted(cluster: &Cluster<'_>, port: u16, reason: &str) -> Result<u64> {
    let rule = if port == 10250 { "kubelet" } else { "web" };
    let of_it = |counter: &&Counter| counter.rule == rule && counter.reason == reason && counter.verdict == "Deny";
    Ok(cluster.status()?.counters.iter().filter(of_it).map(|counter| counter.packets).sum())
}

/// Everybody who is not the tunnel.
pub(crate) fn attempts(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    let web = cluster.address("web")?;
    let (bystander, kubelet) = (cluster.address("bystander")?, (at().node, 10250));
    let denied = |attempt: &dyn Fn() -> Result<bool>, source: &str, (host, port): (&str, u16)| {
        let (since, before) = (SystemTime::now(), counted(cluster, port, "no-selector")?);
        if attempt()? {
            return Ok("connected".to_owned());
        }
        reported(cluster, since, source, host, port, "no-selector")?;
        let more = counted(cluster, port, "no-selector")? - before;
        ensure!(more > 0, "the counter did not move");
        Ok(format!("denied, no-selector ({more} packets counted)"))
    };
    for (who, from, source) in
        [("control plane", Where::Control, at().control_direct), ("neighbour host", Where::Neighbour, at().neighbour)]
    {
        for (what, host, port) in [("kubelet 10250", at().node, 10250), ("web pod 8080", &*web, 8080)] {
            table.check(who, what, "direct", "denied, no-selector", || {
                denied(&|| connects(cluster, from, source, (host, port)), source, (host, port))
            })?;
        }
    }
    for (what, host, port) in [("kubelet 10250", at().node, 10250), ("web pod 8080", &*web, 8080)] {
        table.check("another pod", what, "direct", "denied, no-selector", || {
            denied(&|| pod_connects(cluster, "bystander", host, &port.to_string()), &bystander, (host, port))
        })?;
    }
    table.check("hostNetwork pod", "kubelet 10250", "direct", "denied, no-selector", || {
        denied(&|| pod_connects(cluster, "host", at().node, "10250"), at().node, kubelet)
    })?;
    table.check("process on the node", "kubelet 10250", "direct", "denied, no-selector", || {
        denied(&|| node_process_connects(cluster, at().node, 10250), at().node, kubelet)
    })?;
    table.check("process on the node", "kubelet 10250 on loopback", "direct", "denied, no-selector", || {
        denied(&|| node_process_connects(cluster, at().loopback, 10250), at().loopback, (at().loopback, 10250))
    })?;
    let letting_in = |answered: bool| Ok(if answered { "connected" } else { "no answer" }.to_owned());
    table.check("scraper (ipBlock)", "kubelet 10250", "direct", "connected", || {
        letting_in(connects(cluster, Where::Neighbour, at().scraper, (at().node, 10250))?)
    })?;
    table.check("process on the node", "web pod 8080 (node: {})", "direct", "connected", || {
        letting_in(node_process_connects(cluster, &web, 8080)?)
    })?;
    table.check("another pod", "web pod 8081, not guarded", "direct", "connected", || {
        letting_in(pod_connects(cluster, "bystander", &web, "8081")?)
    })?;
    table.check("another pod", "API server at its ClusterIP", "direct", "connected", || {
        letting_in(pod_connects(cluster, "bystander", at().api_service, "443")?)
    })?;
    table.check("another pod", "web pod at its ClusterIP", "direct", "denied, no-selector", || {
        let service = cluster.kubectl.run(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
        denied(&|| pod_connects(cluster, "bystander", &service, "80"), &bystander, (&web, 8080))
    })
}

/// What only an edit of the policy lets in, and where pods may not go.
pub(crate) fn edited(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    if !table.wants("scraper pod") && !table.wants("hub rule") {
        return Ok(());
    }
    let scraper =
        format!("        - ipBlock: {{cidr: '{}/{}'}}\n    - name: web\n", cluster.address("bystander")?, at().whole);
    let hub = format!("  controlPlane: {{addresses: ['{}/{}'], ports: [6443, 8132]}}\n", at().control, at().whole);
    cluster.enforce(&(policy("Enforce").replace("    - name: web\n", &scraper) + &hub))?;
    table.check("scraper pod", "kubelet 10250 (ipBlock)", "direct", "connected", || {
        Ok(if pod_connects(cluster, "bystander", at().node, "10250")? { "connected" } else { "no answer" }.to_owned())
    })?;
    for (what, host, port, expected) in [
        ("API server at its ClusterIP", at().api_service, "443", "connected"),
        ("API server at its address", at().control, "6443", "connected"),
        ("etcd's port of the control plane", at().control, "2379", "not permitted"),
    ] {
        table.check("pod, hub rule", what, "direct", expected, || {
            let command = format!("nc -w 3 {host} {port} </dev/null 2>&1; echo ended $?");
            let said = cluster.kubectl.run(&["exec", "bystander", "--", "sh", "-c", &command])?;
            Ok(match (said.contains("ended 0"), said.contains("Operation not permitted")) {
                (true, _) => "connected".to_owned(),
                (false, true) => "not permitted".to_owned(),
                (false, false) => said,
            })
        })?;
    }
    cluster.enforce(&policy("Enforce"))
}

/// A process in the node's cgroup and network namespace, outside any pod.
fn node_process_connects(cluster: &Cluster<'_>, host: &str, port: u16) -> Result<bool> {
    let mut command = cluster.place.command(std::path::Path::new("/bin/busybox"), Where::Node)?;
    command.args(["nc", "-w", "3", host, &port.to_string()]);
    let said = crate::kubectl::finish(&mut command, Vec::new(), Duration::from_secs(20))?;
    match said.code {
        0 => Ok(true),
        1 => Ok(false),
        other => bail!("nc ended with {other}: {}", said.error),
    }
}

/// Kubelet's own probes of a guarded pod port: HTTP, TCP and exec, every second. Some may have failed before its server listened.
pub(crate) fn probes(cluster: &Cluster<'_>, before: u64, table: &mut Table) -> Result<()> {
    let soak = std::env::var_os("NODEGUARD_SOAK").is_some();
    let time = Duration::from_secs(if soak { 600 } else { 20 });
    table.check("kubelet", "probes of a guarded port, each second", format!("{time:?}"), "no failure", || {
        std::thread::sleep(time);
        let failed = failed_probes(cluster)? - before;
        let pod = cluster.kubectl.run(&["get", "pod", "web", "-o", "json"])?;
        let pod: Value = serde_json::from_str(&pod)?;
        let states =
            pod.pointer("/status/containerStatuses").and_then(Value::as_array).context("no container states")?;
        let restarts: u64 = states.iter().filter_map(|state| state.get("restartCount")?.as_u64()).sum();
        let ready = states.iter().all(|state| state.get("ready") == Some(&Value::Bool(true)));
        Ok(match (failed, restarts, ready) {
            (0, 0, true) => "no failure".to_owned(),
            _ => format!("{failed} failed probes, {restarts} restarts, ready: {ready}"),
        })
    })
}

/// How many probes of the guarded pod have failed, ever.
pub(crate) fn failed_probes(cluster: &Cluster<'_>) -> Result<u64> {
    let events = ["get", "events", "--field-selector=reason=Unhealthy,involvedObject.name=web", "-o", "json"];
    let events: Value = serde_json::from_str(&cluster.kubectl.run(&events)?)?;
    let events = events["items"].as_array().context("a list")?;
    Ok(events.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum())
}
