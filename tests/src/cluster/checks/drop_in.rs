//! Owns the drop-in: the upstream project's example manifest with nothing changed but image, command, server and account.
//! Called by `main`, before the guard is installed.
//! Must never give it a right or an argument that the example does not have.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{
    addresses::at,
    install::{Cluster, IMAGE},
    kubectl::Stream,
    node::NAME,
    table::Table,
};

/// Kubernetes' documentation, "Set up Konnectivity service", konnectivity-agent.yaml. `--dial-anything` is the one word that says what the
/// upstream agent does without being asked; the account is the one that this cluster's proxy-server admits.
const EXAMPLE: &str = r#"apiVersion: v1
kind: ServiceAccount
metadata: {name: nodeguard, namespace: kube-system}
---
apiVersion: apps/v1
kind: DaemonSet
metadata:
  labels:
    addonmanager.kubernetes.io/mode: Reconcile
    k8s-app: konnectivity-agent
  namespace: kube-system
  name: konnectivity-agent
spec:
  selector:
    matchLabels:
      k8s-app: konnectivity-agent
  template:
    metadata:
      labels:
        k8s-app: konnectivity-agent
    spec:
      priorityClassName: system-cluster-critical
      tolerations:
        - key: "CriticalAddonsOnly"
          operator: "Exists"
      containers:
        - image: <image>
          name: konnectivity-agent
          command: ["nodeguard", "agent", "--dial-anything"]
          args: [
                  "--logtostderr=true",
                  "--ca-cert=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
                  "--proxy-server-host=<server>",
                  "--proxy-server-port=8132",
                  "--admin-server-port=8133",
                  "--health-server-port=8134",
                  "--service-account-token-path=/var/run/secrets/tokens/konnectivity-agent-token"
                  ]
          volumeMounts:
            - mountPath: /var/run/secrets/tokens
              name: konnectivity-agent-token
          livenessProbe:
            httpGet:
              port: 8134
              path: /healthz
            initialDelaySeconds: 15
            timeoutSeconds: 15
      serviceAccountName: nodeguard
      volumes:
        - name: konnectivity-agent-token
          projected:
            sources:
              - serviceAccountToken:
                  path: konnectivity-agent-token
                  audience: system:konnectivity-server
"#;

/// Runs it alone, asks kubelet through it, and takes it away.
pub(crate) fn example(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    if !table.wants("drop-in") {
        return Ok(());
    }
    cluster.kubectl.apply(&EXAMPLE.replace("<image>", IMAGE).replace("<server>", at().control))?;
    let rollout = ["-n", "kube-system", "rollout", "status", "daemonset/konnectivity-agent", "--timeout=90s"];
    let rollout = cluster.kubectl.all(Stream::WebSocket, &rollout, Vec::new(), Duration::from_secs(120))?;
    table.check("drop-in", "nodes/proxy healthz, logs of the agent", "upstream's example", "answered", || {
        ensure!(rollout.code == 0, "{}", rollout.error.trim());
        // It is ready without having a tunnel: the example has no such probe. And its log is there once kubelet has told of it.
        lab::process::until("the tunnel is up", Duration::from_secs(30), || {
            let path = format!("/api/v1/nodes/{NAME}/proxy/healthz");
            let health = cluster.kubectl.run(&["get", "--raw", &path]);
            let log = cluster.kubectl.run(&["-n", "kube-system", "logs", "daemonset/konnectivity-agent"]);
            Ok(health.is_ok_and(|said| said == "ok") && log.is_ok_and(|log| log.contains("tunnel connected")))
        })?;
        Ok("answered".to_owned())
    })?;
    cluster.kubectl.run(&["-n", "kube-system", "delete", "daemonset", "konnectivity-agent"])?;
    let gone =
        ["-n", "kube-system", "wait", "--for=delete", "pod", "-l", "k8s-app=konnectivity-agent", "--timeout=50s"];
    cluster.kubectl.run(&gone).map(drop)
}
