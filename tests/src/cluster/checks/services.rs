//! Owns Services behind the egress: an admission webhook and an aggregated API that a pod serves behind a ClusterIP.
//! Called by `checks` for each egress protocol: without the right to read EndpointSlices, without it but named by the policy, with it.
//! Must never take a failure for the guard's refusal: its reason is in the audit line, and over gRPC in what kubectl prints.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::process::until;
use serde_json::Value;

use crate::{
    addresses::{Addresses, at},
    control::{Egress, PATIENCE},
    install::{Cluster, daemonset, deployed, policy},
    kubectl::{Said, Stream},
    pki::Pki,
    table::Table,
};

/// The pod, guarded like any, and its two Services: one would do, but each has its own address so.
const POD: &str = r"apiVersion: v1
kind: Pod
metadata: {name: hook, labels: {app: hook}}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  volumes: [{name: tls, secret: {secretName: hook-tls}}]
  containers:
  - name: hook
    image: localhost/hook:lab
    imagePullPolicy: Never
    args: ['[::]:8443', /tls/tls.crt, /tls/tls.key]
    volumeMounts: [{name: tls, mountPath: /tls, readOnly: true}]
    readinessProbe: {tcpSocket: {port: 8443}, periodSeconds: 1, timeoutSeconds: 10}
---
apiVersion: v1
kind: Service
metadata: {name: hook}
spec: {selector: {app: hook}, ports: [{name: https, port: 443, targetPort: 8443}]}
---
apiVersion: v1
kind: Service
metadata: {name: api}
spec: {selector: {app: hook}, ports: [{name: https, port: 443, targetPort: 8443}]}
";

/// Asked about labelled ConfigMaps alone.
const WEBHOOK: &str = "apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: hook}
webhooks:
- name: hook.example.com
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 10
  objectSelector: {matchLabels: {hook: asked}}
  rules: [{apiGroups: [''], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
  clientConfig: {service: {namespace: default, name: hook, port: 443, path: /validate}, caBundle: CA}
";

const API: &str = "apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.lab.example.com}
spec:
  group: lab.example.com
  version: v1
  groupPriorityMinimum: 100
  versionPriority: 100
  service: {namespace: default, name: api, port: 443}
  caBundle: CA
";

/// What the aggregated API says.
const REVIEWS: &str = "/apis/lab.example.com/v1/reviews";

/// The cluster's policy, with the hook's port guarded and dialled: `allow` is who else may reach it, `tunnel` what else is dialled.
fn with_hook(allow: &str, tunnel: &str) -> String {
    let pods = at().pods;
    let rule = format!(
        "    - name: hook\n      pods: {{cidrs: ['{pods}'], ports: [8443]}}\n      allow:\n        - tunnel: {{}}\n        - node: {{}}\n{allow}  tunnel:\n"
    );
    let policy = policy("Enforce").replacen("  tunnel:\n", &rule, 1);
    format!("{policy}      - pods: {{cidrs: ['{pods}'], ports: [8443]}}\n{tunnel}")
}

/// Everything, for one egress protocol. Afterwards the guard and its policy are what they were.
pub(crate) fn all(cluster: &Cluster<'_>, pki: &Pki, egress: Egress, table: &mut Table) -> Result<()> {
    if !table.wants("API server") {
        return Ok(());
    }
    served(cluster, pki)?;
    // A prefix of pods that holds the service range too admits no Service by that.
    let Addresses { whole, services, pods_of, family, .. } = at();
    let wide = if *family == "ip" { "10.0.0.0/8" } else { "fd00::/16" };
    let wide = format!("      - pods: {{cidrs: ['{wide}'], ports: [443]}}\n");
    cluster.enforce(&with_hook("", &wide))?;
    refused(cluster, egress, "without the right", "service-address", "deploy/services.yaml", table)?;

    // Dialled as it is: kube-proxy rewrites, and the pod sees an address of the node.
    let named = format!("      - services: {{ports: [443]}}\n    serviceCidrs: ['{services}']\n");
    let gateway = format!("        - ipBlock: {{cidr: '{}/{whole}'}}\n", gateway(pods_of[0])?);
    cluster.enforce(&with_hook(&gateway, &named))?;
    answered(cluster, egress, "named by the policy", table)?;

    cluster.enforce(&with_hook("", ""))?;
    watching(cluster, true)?;
    refused(cluster, egress, "flag without the role", "services-unread", "is forbidden", table)?;
    cluster.kubectl.apply(&deployed("services.yaml")?)?;
    until("the guard has read the Services", PATIENCE, || {
        std::thread::sleep(Duration::from_millis(200));
        Ok(cluster.status()?.dialling.services.is_some_and(|services| services.read))
    })?;
    answered(cluster, egress, "with the role", table)?;
    let address = cluster.address("hook")?;
    table.check(
        "API server",
        "a webhook without a ready pod, with the role",
        egress,
        "refused, service-not-ready",
        || {
            cluster.kubectl.run(&["delete", "pod", "hook", "--wait=true"])?;
            let said = create(cluster, "no")?;
            ready(cluster)?;
            why(cluster, egress, &said, "service-not-ready", "no endpoint that takes connections")
        },
    )?;
    // The API server keeps its connection to the webhook: the record is written when the pod has ended.
    table.check("API server", "a webhook, with the role: the record", egress, "endpoint", || {
        let requested = format!("{}:443", cluster_ip(cluster, "hook")?);
        let record = record(cluster, &requested, "admitted", |record| record["verdict"] == "admitted")?;
        ensure!(
            record["dialled"] == SocketAddr::new(address.parse()?, 8443).to_string()
                && record["service"] == "default/hook",
            "{record}"
        );
        Ok("endpoint".to_owned())
    })?;
    cluster.kubectl.run(&["delete", "-f", &crate::pki::text(&manifest("services.yaml"))?])?;
    watching(cluster, false)?;
    for (kind, name) in [("validatingwebhookconfiguration", "hook"), ("apiservice", "v1.lab.example.com")] {
        cluster.kubectl.run(&["delete", kind, name])?;
    }
    cluster.enforce(&policy("Enforce"))
}

/// The node's own address in the network of its pods.
fn gateway(pods: &str) -> Result<IpAddr> {
    let first = match pods.parse::<IpNet>()? {
        IpNet::V4(pods) => pods.hosts().next().map(IpAddr::from),
        IpNet::V6(pods) => pods.hosts().nth(1).map(IpAddr::from),
    };
    first.with_context(|| format!("{pods} is empty"))
}

/// A file of deploy/.
fn manifest(file: &str) -> std::path::PathBuf {
    std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join(file)
}

/// The guard is started with --watch-services by the patch that is shipped, which can be applied again and outlives an update; or as before.
fn watching(cluster: &Cluster<'_>, wanted: bool) -> Result<()> {
    let daemon = ["-n", "kube-system"];
    if wanted {
        let file = format!("--patch-file={}", crate::pki::text(&manifest("services-patch.yaml"))?);
        let patch = [&daemon[..], &["patch", "daemonset", "nodeguard", &file]].concat();
        let generation =
            [&daemon[..], &["get", "daemonset", "nodeguard", "-o", "jsonpath={.metadata.generation}"]].concat();
        cluster.kubectl.run(&patch)?;
        let patched = cluster.kubectl.run(&generation)?;
        cluster.kubectl.run(&patch)?;
        // Of the manifest the DaemonSet alone: its policy is the shipped one.
        let whole = daemonset()?;
        let updated = whole.split("\n---\n").find(|document| document.contains("kind: DaemonSet"));
        cluster.kubectl.apply(updated.context("the manifest has a DaemonSet")?)?;
        let now = cluster.kubectl.run(&generation)?;
        ensure!(now == patched, "the patch, or the manifest after it, changed something again: {patched}, {now}");
        // Without the role it is not ready: the rollout says that something is missing.
        return until("the new guard serves", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(300));
            Ok(cluster.status().is_ok_and(|status| status.dialling.services.is_some()))
        });
    }
    cluster.kubectl.run(&[&daemon[..], &["rollout", "undo", "daemonset/nodeguard"]].concat())?;
    cluster.guard_ready()
}

/// The pod with its certificate, and both of its uses; until it is ready.
fn served(cluster: &Cluster<'_>, pki: &Pki) -> Result<()> {
    if !pki.path("hook-tls.crt").is_file() {
        pki.serving("hook-tls", &["hook.default.svc", "api.default.svc"])?;
    }
    let (certificate, key) = (pki.text("hook-tls.crt")?, pki.text("hook-tls.key")?);
    let (certificate, key) = (format!("--cert={certificate}"), format!("--key={key}"));
    let secret = ["create", "secret", "tls", "hook-tls", &certificate, &key, "--dry-run=client", "-o", "yaml"];
    cluster.kubectl.apply(&cluster.kubectl.run(&secret)?)?;
    let file = format!("--from-file=ca={}", pki.text("ca.crt")?);
    let map = ["create", "secret", "generic", "ca", &file, "--dry-run=client", "-o", "jsonpath={.data.ca}"];
    let bundle = cluster.kubectl.run(&map)?;
    ready(cluster)?;
    cluster.kubectl.apply(&WEBHOOK.replace("CA", &bundle))?;
    cluster.kubectl.apply(&API.replace("CA", &bundle))
}

fn ready(cluster: &Cluster<'_>) -> Result<()> {
    cluster.kubectl.apply(POD)?;
    cluster.kubectl.run(&["wait", "--for=condition=Ready", "pod/hook", "--timeout=50s"]).map(drop)
}

/// Creates what the webhook is asked about.
fn create(cluster: &Cluster<'_>, deny: &str) -> Result<Said> {
    let map = serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"generateName": "asked-", "labels": {"hook": "asked"}}, "data": {"deny": deny},
    });
    let create = ["create", "-f", "-"];
    cluster.kubectl.all(Stream::WebSocket, &create, map.to_string().into_bytes(), Duration::from_secs(60))
}

/// How often the webhook was asked, by the aggregated API.
fn reviews(cluster: &Cluster<'_>) -> Result<u64> {
    let said: Value = serde_json::from_str(&cluster.kubectl.run(&["get", "--raw", REVIEWS])?)?;
    said["count"].as_u64().with_context(|| said.to_string())
}

/// Both answer, and it is the pod that does.
fn answered(cluster: &Cluster<'_>, egress: Egress, how: &str, table: &mut Table) -> Result<()> {
    table.check("API server", &format!("an aggregated API, {how}"), egress, "answered", || {
        // The API server looks at it every few seconds, and serves it once it has found it.
        until("the aggregated API is available", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(300));
            Ok(reviews(cluster).is_ok())
        })?;
        Ok("answered".to_owned())
    })?;
    table.check("API server", &format!("a webhook, {how}"), egress, "asked, admits and denies", || {
        let before = reviews(cluster)?;
        let (good, bad) = (create(cluster, "no")?, create(cluster, "yes")?);
        ensure!(good.code == 0, "{}", good.error);
        ensure!(bad.code != 0 && bad.error.contains("the webhook in the pod says no"), "{}", bad.error);
        let asked = reviews(cluster)? - before;
        ensure!(asked == 2, "it was asked {asked} times");
        Ok("asked, admits and denies".to_owned())
    })
}

/// Neither is dialled: with the reason in what kubectl prints and in the audit line.
fn refused(
    cluster: &Cluster<'_>,
    egress: Egress,
    how: &str,
    reason: &str,
    words: &str,
    table: &mut Table,
) -> Result<()> {
    let expected = format!("refused, {reason}");
    table.check("API server", &format!("a webhook, {how}"), egress, &expected, || {
        why(cluster, egress, &create(cluster, "no")?, reason, words)
    })?;
    table.check("API server", &format!("an aggregated API, {how}"), egress, &expected, || {
        let said =
            cluster.kubectl.all(Stream::WebSocket, &["get", "--raw", REVIEWS], Vec::new(), Duration::from_secs(60))?;
        ensure!(said.code != 0, "it was answered: {}", said.text());
        // kubectl prints that the service is unavailable; the API server says why where it looks whether it is there.
        let message = "jsonpath={.status.conditions[?(@.type==\"Available\")].message}";
        let shown = if egress == Egress::Grpc { words } else { "502 Bad Gateway" };
        until("the APIService says why", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(300));
            Ok(cluster.kubectl.run(&["get", "apiservice", "v1.lab.example.com", "-o", message])?.contains(shown))
        })?;
        let requested = format!("{}:443", cluster_ip(cluster, "api")?);
        record(cluster, &requested, reason, |record| record["reason"] == reason)?;
        Ok(expected.clone())
    })
}

/// A webhook that was not dialled, and why.
fn why(cluster: &Cluster<'_>, egress: Egress, said: &Said, reason: &str, words: &str) -> Result<String> {
    ensure!(said.code != 0, "it was admitted: {}", said.text());
    let shown = if egress == Egress::Grpc { words } else { "502 Bad Gateway" };
    ensure!(said.error.contains(shown), "kubectl says {:?}", said.error.trim());
    let requested = format!("{}:443", cluster_ip(cluster, "hook")?);
    record(cluster, &requested, reason, |record| record["reason"] == reason)?;
    Ok(format!("refused, {reason}"))
}

/// The address of a Service, as it is written before a port.
fn cluster_ip(cluster: &Cluster<'_>, service: &str) -> Result<String> {
    let ip = cluster.kubectl.run(&["get", "service", service, "-o", "jsonpath={.spec.clusterIP}"])?;
    Ok(if ip.contains(':') { format!("[{ip}]") } else { ip })
}

/// The newest audit line of an address that is so.
fn record(cluster: &Cluster<'_>, requested: &str, how: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
    let logs = ["-n", "kube-system", "logs", "daemonset/nodeguard", "--tail=400"];
    let mut last = String::new();
    for _ in 0..20 {
        last = cluster.kubectl.run(&logs)?;
        let mut records = last.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(found) = records.find(|record| record["requested"] == requested && is_so(record)) {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(250));
    }
    let near: Vec<&str> = last.lines().filter(|line| line.contains(requested)).collect();
    anyhow::bail!("no audit line of {requested} that is {how}: {near:?}")
}
