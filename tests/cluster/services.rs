//! Owns Services behind the egress: an admission webhook and an aggregated API that a pod serves behind a ClusterIP.
//! Called by `checks` for each egress protocol: without the right to read EndpointSlices, without it but named by the policy, with it.
//! Must never take a failure for the guard's refusal: its reason is in the audit line, and over gRPC in what kubectl prints.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::{
    cluster::{Addresses, Cluster, Egress, Said, Table, at, daemonset, deployed, eventually, policy, text},
    process::until,
};
use serde_json::Value;

use crate::refused::shown;

/// What the aggregated API serves.
const REVIEWS: &str = "get --raw /apis/lab.example.com/v1/reviews";

/// The cluster's policy, with the hook's port guarded and dialled: `allow` is who else may reach it, `tunnel` what else is dialled.
fn with_hook(allow: &str, tunnel: &str) -> String {
    let pods = at().pods;
    let rule = format!(
        "    - name: hook\n      pods: {{cidrs: ['{pods}'], ports: [8443]}}\n      allow:\n        - tunnel: {{}}\n        - node: {{}}\n{allow}  tunnel:\n"
    );
    let policy = policy().replacen("  tunnel:\n", &rule, 1);
    format!("{policy}      - pods: {{cidrs: ['{pods}'], ports: [8443]}}\n{tunnel}")
}

/// Everything, for one egress protocol. Afterwards the guard and its policy are what they were.
pub(crate) fn all(cluster: &Cluster, egress: Egress, table: &mut Table) -> Result<()> {
    if !table.wants("API server") {
        return Ok(());
    }
    serve(cluster)?;
    // A prefix of pods that holds the service range too admits no Service by that.
    let Addresses { whole, services, pods_of, .. } = at();
    let wide = if at().v6() { "fd00::/16" } else { "10.0.0.0/8" };
    let wide = format!("      - pods: {{cidrs: ['{wide}'], ports: [443]}}\n");
    cluster.enforce(&with_hook("", &wide))?;
    refused(cluster, egress, "without the right", "service-address", "deploy/services.yaml", table)?;

    // Dialled as it is: kube-proxy rewrites, and the pod sees an address of the node.
    let named = format!("      - services: {{ports: [443]}}\n    serviceCidrs: ['{services}']\n");
    let gateway = format!("        - ipBlock: {{cidr: '{}/{whole}'}}\n", gateway(pods_of[0])?);
    cluster.enforce(&with_hook(&gateway, &named))?;
    answered(cluster, egress, "named by the policy", table)?;

    cluster.enforce(&with_hook("", ""))?;
    watch_services(cluster)?;
    refused(cluster, egress, "flag without the role", "services-unread", "is forbidden", table)?;
    let role = text(&deployed("services.yaml"))?;
    cluster.kubectl(&format!("apply -f {role}")).run()?;
    eventually("the guard has read the Services", || {
        Ok(cluster.status()?.dialling.services.is_some_and(|services| services.read))
    })?;
    answered(cluster, egress, "with the role", table)?;
    let address = cluster.address("hook")?;
    let unready = "a webhook without a ready pod, with the role";
    table.holds("API server", unready, egress, "refused, service-not-ready", || {
        cluster.kubectl("delete pod hook --wait=true").run()?;
        let said = create(cluster, "no")?;
        start_pod(cluster)?;
        why(cluster, egress, &said, "service-not-ready", "no endpoint that accepts connections")
    })?;
    // The API server keeps its connection to the webhook: the record is written when the pod has ended.
    table.holds("API server", "a webhook, with the role: the record", egress, "endpoint", || {
        let record = record(cluster, "hook", "admitted", |record| record["verdict"] == "admitted")?;
        let endpoint = SocketAddr::new(address.parse()?, 8443).to_string();
        ensure!(record["dialled"] == endpoint && record["service"] == "default/hook", "{record}");
        Ok(())
    })?;
    cluster.kubectl(&format!("delete -f {role}")).run()?;
    cluster.system("rollout undo daemonset/nodeguard").run()?;
    cluster.guard_ready()?;
    cluster.kubectl("delete validatingwebhookconfiguration hook").run()?;
    cluster.kubectl("delete apiservice v1.lab.example.com").run()?;
    cluster.enforce(&policy())
}

/// The node's own address in the network of its pods.
fn gateway(pods: &str) -> Result<IpAddr> {
    let first = match pods.parse::<IpNet>()? {
        IpNet::V4(pods) => pods.hosts().next().map(IpAddr::from),
        IpNet::V6(pods) => pods.hosts().nth(1).map(IpAddr::from),
    };
    first.with_context(|| format!("{pods} is empty"))
}

/// Starts the guard with --watch-services by the patch that is shipped, which can be applied again and outlives an update.
fn watch_services(cluster: &Cluster) -> Result<()> {
    let patch = format!("patch daemonset nodeguard --patch-file={}", text(&deployed("services-patch.yaml"))?);
    let generation = || cluster.system("get daemonset nodeguard -o jsonpath={.metadata.generation}").run();
    cluster.system(&patch).run()?;
    let patched = generation()?;
    cluster.system(&patch).run()?;
    // Of the manifest the DaemonSet alone: its policy is the shipped one.
    let whole = daemonset()?;
    let updated = whole.split("\n---\n").find(|document| document.contains("kind: DaemonSet"));
    cluster.apply(updated.context("the manifest has a DaemonSet")?)?;
    let now = generation()?;
    ensure!(now == patched, "the patch, or the manifest after it, changed something again: {patched}, {now}");
    // Without the role it is not ready: the rollout shows that something is missing.
    eventually("the new guard serves", || Ok(cluster.status().is_ok_and(|status| status.dialling.services.is_some())))
}

/// Starts the pod with its certificate, and creates both of its uses.
fn serve(cluster: &Cluster) -> Result<()> {
    let pki = &cluster.pki;
    if !pki.path("hook-tls.crt").is_file() {
        pki.sign("hook-tls", "hook-tls", "", &["hook.default.svc", "api.default.svc"])?;
    }
    let files = format!("--cert={} --key={}", text(&pki.path("hook-tls.crt"))?, text(&pki.path("hook-tls.key"))?);
    let secret = format!("create secret tls hook-tls {files} --dry-run=client -o yaml");
    cluster.apply(&cluster.kubectl(&secret).run()?)?;
    let ca = format!(
        "create secret generic ca --from-file=ca={} --dry-run=client -o jsonpath={{.data.ca}}",
        text(&pki.path("ca.crt"))?
    );
    let bundle = cluster.kubectl(&ca).run()?;
    start_pod(cluster)?;
    cluster.apply(&include_str!("files/hook.yaml").replace("<bundle>", &bundle))
}

fn start_pod(cluster: &Cluster) -> Result<()> {
    cluster.pod("hook", include_str!("files/hook-pod.yaml"))
}

/// Creates what the webhook is asked about.
fn create(cluster: &Cluster, deny: &str) -> Result<Said> {
    let map = serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"generateName": "asked-", "labels": {"hook": "asked"}}, "data": {"deny": deny},
    });
    cluster.kubectl("create -f -").input(map.to_string()).said()
}

/// How often the webhook was asked, by the aggregated API.
fn reviews(cluster: &Cluster) -> Result<u64> {
    let said = cluster.kubectl(REVIEWS).json()?;
    said["count"].as_u64().with_context(|| said.to_string())
}

/// Both answer, and it is the pod that does.
fn answered(cluster: &Cluster, egress: Egress, how: &str, table: &mut Table) -> Result<()> {
    table.holds("API server", &format!("an aggregated API, {how}"), egress, "answered", || {
        // The API server looks at it every few seconds, and serves it once it has found it.
        eventually("the aggregated API is available", || Ok(reviews(cluster).is_ok()))
    })?;
    table.holds("API server", &format!("a webhook, {how}"), egress, "asked, admits and denies", || {
        let before = reviews(cluster)?;
        let (good, bad) = (create(cluster, "no")?, create(cluster, "yes")?);
        ensure!(good.code == 0, "{}", good.error);
        ensure!(bad.code != 0 && bad.error.contains("the webhook in the pod says no"), "{}", bad.error);
        let asked = reviews(cluster)? - before;
        ensure!(asked == 2, "it was asked {asked} times");
        Ok(())
    })
}

/// Neither is dialled: with the reason in what kubectl prints and in the audit line.
fn refused(cluster: &Cluster, egress: Egress, how: &str, reason: &str, words: &str, table: &mut Table) -> Result<()> {
    let expected = format!("refused, {reason}");
    table.holds("API server", &format!("a webhook, {how}"), egress, &expected, || {
        why(cluster, egress, &create(cluster, "no")?, reason, words)
    })?;
    table.holds("API server", &format!("an aggregated API, {how}"), egress, &expected, || {
        let said = cluster.kubectl(REVIEWS).said()?;
        ensure!(said.code != 0, "it was answered: {}", said.text());
        // kubectl prints that the service is unavailable; the API server says why in the condition of the APIService.
        let message = r#"jsonpath={.status.conditions[?(@.type=="Available")].message}"#;
        let service = format!("get apiservice v1.lab.example.com -o {message}");
        eventually("the APIService says why", || Ok(cluster.kubectl(&service).run()?.contains(shown(egress, words))))?;
        record(cluster, "api", reason, |record| record["reason"] == reason).map(drop)
    })
}

/// A webhook was not dialled, for this reason.
fn why(cluster: &Cluster, egress: Egress, said: &Said, reason: &str, words: &str) -> Result<()> {
    ensure!(said.code != 0, "it was admitted: {}", said.text());
    ensure!(said.error.contains(shown(egress, words)), "kubectl says {:?}", said.error.trim());
    record(cluster, "hook", reason, |record| record["reason"] == reason).map(drop)
}

/// Waits for an audit line of a Service that fits; the newest one.
fn record(cluster: &Cluster, service: &str, how: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
    let ip = cluster.kubectl(&format!("get service {service} -o jsonpath={{.spec.clusterIP}}")).run()?;
    let requested = SocketAddr::new(ip.parse()?, 443).to_string();
    let (mut found, mut near) = (None, Vec::new());
    let waited = until(&format!("an audit line of {requested} that is {how}"), Duration::from_secs(20), || {
        let log = cluster.log(400)?;
        let mut records = log.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        found = records.find(|record| record["requested"] == requested && fits(record));
        near = log.lines().filter(|line| line.contains(&requested)).map(str::to_owned).collect();
        Ok(found.is_some())
    });
    waited.with_context(|| format!("{near:?}"))?;
    found.context("a record")
}
