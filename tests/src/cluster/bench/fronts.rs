//! Owns the other ways to the node: the upstream agent behind a proxy-server of its own, and an API server that dials the node itself.
//! Called by `bench`.
//! Must never carry a request of one way by another, nor give the upstream agent less of the machine than the guard has.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{
    addresses::at,
    control::{Control, Egress, Front, STRATEGIES},
    install::Cluster,
    kubectl::Stream,
    pki::Pki,
};

/// The port of the API server whose way is the upstream agent.
pub(super) const UPSTREAM: u16 = 6444;
/// That of the one that dials the node itself.
pub(super) const DIRECT: u16 = 6445;
/// Where the upstream agent's proxy-server takes it.
const AGENTS: u16 = 8232;

/// The upstream agent in the guard's place: the same network, account, token, priority and share of the processors.
const AGENT: &str = r#"apiVersion: apps/v1
kind: DaemonSet
metadata: {name: upstream-agent, namespace: kube-system}
spec:
  selector: {matchLabels: {app: upstream-agent}}
  template:
    metadata: {labels: {app: upstream-agent}}
    spec:
      serviceAccountName: nodeguard
      automountServiceAccountToken: false
      priorityClassName: system-node-critical
      hostNetwork: true
      tolerations: [{operator: Exists}]
      containers:
      - name: agent
        image: localhost/proxy-agent:lab
        imagePullPolicy: Never
        command: [/proxy-agent]
        args:
        - --ca-cert=/identity/ca.crt
        - --service-account-token-path=/identity/token
        - --proxy-server-host=<server>
        - --proxy-server-port=<port>
        - --agent-identifiers=host=$(NODE_NAME)&<family>=$(NODE_ADDRESS)
        - --admin-server-port=8233
        - --health-server-port=8234
        - --keepalive-time=60s
        env:
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: NODE_ADDRESS, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
        resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {memory: 512Mi}}
        volumeMounts: [{name: identity, mountPath: /identity, readOnly: true}]
      volumes:
      - name: identity
        projected:
          sources:
          - serviceAccountToken: {path: token, audience: 'system:konnectivity-server'}
          - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
"#;

/// Its image.
pub(super) const IMAGE: &str = "proxy-agent.tar";

/// Starts both.
pub(super) fn start(cluster: &Cluster<'_>, control: &mut Control, pki: &Pki) -> Result<()> {
    for (port, agents) in [(UPSTREAM, Some(AGENTS)), (DIRECT, None)] {
        let front = Front { port, agents, egress: Egress::Grpc, strategies: STRATEGIES };
        control.add(cluster.place, pki, &front)?;
    }
    // The one that dials itself has to be let out.
    cluster.place.let_out(10250)?;
    let family = if at().whole == 32 { "ipv4" } else { "ipv6" };
    let agent = AGENT.replace("<server>", at().control).replace("<port>", &AGENTS.to_string());
    cluster.kubectl.apply(&agent.replace("<family>", family))?;
    let rollout = ["-n", "kube-system", "rollout", "status", "daemonset/upstream-agent", "--timeout=90s"];
    let rollout = cluster.kubectl.all(Stream::WebSocket, &rollout, Vec::new(), Duration::from_secs(120))?;
    ensure!(rollout.code == 0, "the upstream agent: {}", rollout.error.trim());
    Ok(())
}
