//! Owns what is brought into the cluster: access for the proxy-server, the files of deploy/, pods to try.
//! Called by `main`.
//! Must never change more of deploy/ than names and addresses: what is tried is what operators install.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{client::Digest, process::until};
use nodeguard::report::status::Status;

use crate::{
    addresses::{Addresses, at},
    control::PATIENCE,
    kubectl::{Kubectl, Stream},
    node::Node,
    place::Place,
};

/// A cluster that answers.
pub(crate) struct Cluster<'a> {
    /// Where it stands.
    pub(crate) place: &'a Place,
    /// Its administrator.
    pub(crate) kubectl: &'a Kubectl<'a>,
}

/// What `cargo xtask image` calls it.
pub(crate) const IMAGE: &str = concat!("localhost/nodeguard:", env!("CARGO_PKG_VERSION"));

/// Who may ask the API server about tokens: konnectivity's documentation has the same binding.
const ACCESS: &str = "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: 'system:konnectivity-server'}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'system:auth-delegator'}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: 'system:konnectivity-server'}]
";

/// The pods: a server with one guarded and one open port and all kinds of probes, a bystander, one in the node's network.
pub(crate) const PODS: &str = r#"apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  volumes: [{name: www, emptyDir: {}}]
  containers:
  - name: web
    image: localhost/busybox:lab
    imagePullPolicy: Never
    command: [sh, -c]
    args:
    - |
      cd /www; echo ok > index.html; head -c 20000000 /dev/urandom > bytes
      httpd -p 8081 -h /www; exec httpd -f -p 8080 -h /www
    volumeMounts: [{name: www, mountPath: /www}]
    readinessProbe: {httpGet: {port: 8080, path: /index.html}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
    livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
  - name: ticks
    image: localhost/busybox:lab
    imagePullPolicy: Never
    command: [sh, -c, 'while true; do echo tick; sleep 0.2; done']
    readinessProbe: {exec: {command: ['true']}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: bystander}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: sh, image: 'localhost/busybox:lab', imagePullPolicy: Never, command: [sleep, '1000000']}]
---
apiVersion: v1
kind: Pod
metadata: {name: host}
spec:
  hostNetwork: true
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: sh, image: 'localhost/busybox:lab', imagePullPolicy: Never, command: [sleep, '1000000']}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"#;

/// What the operator of this cluster enforces. Nothing on the node itself may use kubelet's port, and pods may not use the web's.
pub(crate) fn policy(mode: &str) -> String {
    let Addresses { scraper, whole, pods, .. } = at();
    format!(
        "apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata:
  name: nodes
spec:
  mode: {mode}
  guard:
    - name: kubelet
      node: {{ports: [10250]}}
      allow:
        - tunnel: {{}}
        - ipBlock: {{cidr: '{scraper}/{whole}'}}
    - name: web
      pods: {{cidrs: ['{pods}'], ports: [8080]}}
      allow:
        - tunnel: {{}}
        - node: {{}}
  tunnel:
    dial:
      - node: {{ports: [10250]}}
      - pods: {{cidrs: ['{pods}'], ports: [8080]}}
"
    )
}

/// The image of the pod that serves a webhook and an aggregated API, which the checks have and the bench has not.
pub(crate) const HOOK: &str = "hook.tar";

/// The archives that the node imports: exactly what `cargo xtask image` wrote, the pods' two, and more of those beside them.
pub(crate) fn images(more: &[&str]) -> Result<Vec<PathBuf>> {
    let target = lab::lab::target()?;
    let pods = ["pause.tar", "busybox.tar"];
    let pods = pods.iter().chain(more).map(|file| target.with_file_name("cluster").join(file));
    let images: Vec<PathBuf> = [target.with_file_name("image").join("nodeguard.tar")].into_iter().chain(pods).collect();
    for image in &images {
        ensure!(
            image.is_file(),
            "{} is missing: `cargo xtask test cluster`, or bench cluster, makes it",
            image.display()
        );
    }
    Ok(images)
}

/// A file of deploy/.
pub(crate) fn deployed(file: &str) -> Result<String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join(file);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// deploy/daemonset.yaml as it is, but for what every operator fills in.
pub(crate) fn daemonset() -> Result<String> {
    let mut manifest = deployed("daemonset.yaml")?;
    for (blank, filled) in [("<image>", IMAGE), ("<konnectivity server>", at().control)] {
        ensure!(manifest.contains(blank), "the manifest has no {blank}");
        manifest = manifest.replace(blank, filled);
    }
    Ok(manifest)
}

impl Cluster<'_> {
    /// Who may do what.
    pub(crate) fn access(&self) -> Result<()> {
        self.kubectl.apply(ACCESS)
    }

    /// Waits until the node takes pods.
    pub(crate) fn node_ready(&self, name: &str, node: &mut Node) -> Result<()> {
        let ready = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        until("the node is ready", PATIENCE, || {
            node.check()?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(self.kubectl.run(&["get", "node", name, "-o", ready]).is_ok_and(|said| said == "True"))
        })
    }

    /// Installs deploy/daemonset.yaml.
    pub(crate) fn install_guard(&self) -> Result<()> {
        self.kubectl.apply(&daemonset()?)?;
        self.guard_ready()
    }

    /// Waits until the DaemonSet's pod is ready.
    pub(crate) fn guard_ready(&self) -> Result<()> {
        let rollout = ["-n", "kube-system", "rollout", "status", "daemonset/nodeguard", "--timeout=120s"];
        let rollout = self.kubectl.all(Stream::WebSocket, &rollout, Vec::new(), Duration::from_secs(150))?;
        if rollout.code == 0 {
            return Ok(());
        }
        let about =
            self.kubectl.run(&["-n", "kube-system", "describe", "pods", "-l", "app.kubernetes.io/name=nodeguard"]);
        anyhow::bail!("the guard is not ready: {}\n{}", rollout.error.trim(), about.unwrap_or_default())
    }

    /// Waits until something comes through the tunnel again.
    pub(crate) fn tunnel_up(&self) -> Result<()> {
        until("the tunnel is up again", PATIENCE, || Ok(self.epoch().is_ok()))
    }

    /// Starts pods and waits until they are ready.
    pub(crate) fn pods(&self, pods: &str) -> Result<()> {
        // The controller makes it; pods are refused before.
        until("the default service account", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(100));
            Ok(self.kubectl.run(&["get", "serviceaccount", "default"]).is_ok())
        })?;
        self.kubectl.apply(pods)?;
        let wait = ["wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s"];
        let waited = self.kubectl.all(Stream::WebSocket, &wait, Vec::new(), Duration::from_secs(150))?;
        let about = || self.kubectl.run(&["describe", "pods"]).unwrap_or_default();
        ensure!(waited.code == 0, "{}\n{}", waited.error, about());
        Ok(())
    }

    /// Replaces the policy's text in its ConfigMap.
    pub(crate) fn set_policy(&self, policy: &str) -> Result<()> {
        let map = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "nodeguard-policy", "namespace": "kube-system"},
            "data": {"policy.yaml": policy},
        });
        self.kubectl.apply(&map.to_string())
    }

    /// What `nodeguard status` says inside the pod: through the tunnel, as an operator asks.
    pub(crate) fn status(&self) -> Result<Status> {
        let exec = ["-n", "kube-system", "exec", "daemonset/nodeguard", "--", "nodeguard", "status", "-o", "json"];
        Ok(serde_json::from_str(&self.kubectl.run(&exec)?)?)
    }

    /// Sets the policy and waits until the guard says that it is in force.
    pub(crate) fn enforce(&self, policy: &str) -> Result<()> {
        // Not by the epoch: an edit that means the same to the listeners' guard is no new ruleset.
        let mut digest = Digest::default();
        digest.update(policy.as_bytes());
        let sum = digest.finish().split(' ').nth(1).map(str::to_owned);
        self.set_policy(policy)?;
        until("the policy is in force", PATIENCE, || {
            std::thread::sleep(Duration::from_millis(200));
            Ok(Some(self.status()?.policy.digest) == sum)
        })
    }

    /// The number of the ruleset in force.
    pub(crate) fn epoch(&self) -> Result<u64> {
        Ok(self.status()?.policy.epoch.into())
    }

    /// A pod's address.
    pub(crate) fn address(&self, pod: &str) -> Result<String> {
        let address = self.kubectl.run(&["get", "pod", pod, "-o", "jsonpath={.status.podIP}"])?;
        ensure!(!address.is_empty(), "{pod} has no address");
        Ok(address)
    }
}
