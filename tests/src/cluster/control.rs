//! Owns the control plane: etcd, kube-apiserver with an egress selector, proxy-server, controller manager, scheduler.
//! Called by the cluster, by checks that change the egress, and by the bench, which adds API servers.
//! Must never be able to open a connection to the node: its namespace's packet filter sees to that.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use anyhow::{Context, Result};

use super::{
    addresses::filled,
    eventually,
    kubectl::Call,
    pki::Pki,
    place::{Place, Where},
};
use crate::process::{Process, target, there};

/// The protocol between kube-apiserver and proxy-server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// One gRPC stream a connection.
    Grpc,
    /// HTTP CONNECT.
    HttpConnect,
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Egress::Grpc => "gRPC",
            Egress::HttpConnect => "HTTP-Connect",
        })
    }
}

/// An API server and its way to the nodes.
#[derive(Clone, Copy, Debug)]
pub struct Front {
    /// Its port.
    pub port: u16,
    /// Where the proxy-server behind it takes agents; without one, the API server dials nodes and pods itself.
    pub agents: Option<u16>,
    /// The protocol between the two.
    pub egress: Egress,
    /// How the proxy-server chooses an agent: as a rule by the address that is dialled, otherwise any.
    pub strategies: &'static str,
}

impl Front {
    /// The cluster's own.
    pub fn own(egress: Egress) -> Front {
        Front { port: 6443, agents: Some(8132), egress, strategies: "destHost,default" }
    }
}

/// A running control plane.
pub struct Control {
    place: Arc<Place>,
    pki: Arc<Pki>,
    processes: Vec<Process>,
}

const ETCD: &str = "--name=lab --data-dir=<directory>/etcd --log-level=warn --unsafe-no-fsync
    --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379
    --listen-peer-urls=http://127.0.0.1:2380 --initial-advertise-peer-urls=http://127.0.0.1:2380
    --initial-cluster=lab=http://127.0.0.1:2380";

const API_SERVER: &str = "--etcd-servers=http://127.0.0.1:2379 --secure-port=<port> --bind-address=::
    --advertise-address=<control> --service-cluster-ip-range=<services> --authorization-mode=Node,RBAC
    --enable-admission-plugins=NodeRestriction --kubelet-preferred-address-types=InternalIP,Hostname
    --client-ca-file=<pki>/ca.crt --tls-cert-file=<pki>/apiserver.crt --tls-private-key-file=<pki>/apiserver.key
    --kubelet-certificate-authority=<pki>/ca.crt --kubelet-client-certificate=<pki>/apiserver-kubelet-client.crt
    --kubelet-client-key=<pki>/apiserver-kubelet-client.key --requestheader-client-ca-file=<pki>/ca.crt
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-allowed-names=front-proxy-client
    --proxy-client-cert-file=<pki>/front-proxy-client.crt --proxy-client-key-file=<pki>/front-proxy-client.key
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=<pki>/service-account.crt
    --service-account-signing-key-file=<pki>/service-account.key --shutdown-delay-duration=0s -v=1";

/// Agents prove who they are by service-account tokens, which the API server reviews.
const PROXY_SERVER: &str =
    "--server-port=0 --mode=<mode> --proxy-strategies=<strategies> --uds-name=<socket> --server-count=1
    --agent-namespace=kube-system --agent-service-account=nodeguard --authentication-audience=system:konnectivity-server
    --agent-bind-address=<control> --agent-port=<agents> --admin-bind-address=127.0.0.1 --admin-port=<admin>
    --health-bind-address=127.0.0.1 --health-port=<health> --cluster-cert=<pki>/proxy-server-tls.crt
    --cluster-key=<pki>/proxy-server-tls.key --kubeconfig=<pki>/proxy-server.kubeconfig";

const CONTROLLER: &str = "--kubeconfig=<pki>/<user>.kubeconfig --authentication-kubeconfig=<pki>/<user>.kubeconfig
    --authorization-kubeconfig=<pki>/<user>.kubeconfig --leader-elect=false --bind-address=127.0.0.1 -v=1";

const CONTROLLER_MANAGER: &str = " --use-service-account-credentials=true --root-ca-file=<pki>/ca.crt
    --service-account-private-key-file=<pki>/service-account.key";

const EGRESS: &str = "apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
- name: cluster
  connection: {proxyProtocol: <protocol>, transport: {uds: {udsName: <socket>}}}
";

/// There is no name server. The names that mean something else on the node are harmless here: the API server looks before it dials
/// (CVE-2020-8562).
const HOSTS: &str = "127.0.0.1 localhost\n<node> worker-1 metadata.lab loopback.lab\n";

impl Control {
    /// Starts it and waits until the API server is ready.
    pub fn start(place: &Arc<Place>, pki: &Arc<Pki>, front: Front) -> Result<Control> {
        fs::write(place.directory.join("control-hosts"), filled(HOSTS))?;
        let mut control = Control { place: Arc::clone(place), pki: Arc::clone(pki), processes: Vec::new() };
        control.run("etcd", "", ETCD)?;
        control.add(front)?;
        control.ready()?;
        let manager = CONTROLLER.replace("<user>", "controller-manager") + CONTROLLER_MANAGER;
        control.run("kube-controller-manager", "", &manager)?;
        control.run("kube-scheduler", "", &CONTROLLER.replace("<user>", "scheduler"))?;
        Ok(control)
    }

    /// Replaces the cluster's own front: the same cluster with another protocol, or another choice of agents.
    pub fn change_front(&mut self, front: Front) -> Result<()> {
        self.processes
            .retain(|process| !["proxy-server.log", "kube-apiserver.log"].iter().any(|log| process.log.ends_with(log)));
        self.add(front)?;
        self.ready().context("after proxy-server and kube-apiserver were started anew")
    }

    /// Starts an API server and the proxy-server behind it.
    pub fn add(&mut self, front: Front) -> Result<()> {
        let own = front.port == 6443;
        let which = if own { String::new() } else { format!("-{}", front.port) };
        let socket = self.place.directory.join(format!("konnectivity{which}.sock")).display().to_string();
        let mut api_server = API_SERVER.replace("<port>", &front.port.to_string());
        if !own {
            // The Service of the API server stays the first one's.
            api_server += " --endpoint-reconciler-type=none";
        }
        if let Some(agents) = front.agents {
            let (mode, protocol) = match front.egress {
                Egress::Grpc => ("grpc", "GRPC"),
                Egress::HttpConnect => ("http-connect", "HTTPConnect"),
            };
            let proxy_server = PROXY_SERVER
                .replace("<mode>", mode)
                .replace("<strategies>", front.strategies)
                .replace("<socket>", &socket)
                .replace("<agents>", &agents.to_string())
                .replace("<admin>", &(agents + 1).to_string())
                .replace("<health>", &(agents + 2).to_string());
            self.run("proxy-server", &which, &proxy_server)?;
            let config = self.place.directory.join(format!("egress{which}.yaml"));
            fs::write(&config, EGRESS.replace("<protocol>", protocol).replace("<socket>", &socket))?;
            api_server += &format!(" --egress-selector-config-file={}", config.display());
        }
        self.run("kube-apiserver", &which, &api_server)
    }

    /// Waits until the API server is ready.
    fn ready(&mut self) -> Result<()> {
        binary("kubectl")?;
        eventually("kube-apiserver is ready", || {
            self.check()?;
            Ok(Call::new(&self.place, "get --raw /readyz").run().is_ok())
        })
    }

    fn run(&mut self, program: &str, which: &str, arguments: &str) -> Result<()> {
        let directory = self.place.directory.display().to_string();
        let pki = self.pki.path("").display().to_string();
        let arguments = filled(arguments).replace("<directory>", &directory).replace("<pki>/", &pki);
        let mut command = self.place.command(Path::new("/usr/bin/unshare"), Where::Control)?;
        command.args(["--mount", "--", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
        command.arg(self.place.directory.join("control-hosts")).arg(binary(program)?);
        command.args(arguments.split_whitespace()).env("PROXY_SERVER_ID", "lab");
        let log = self.place.directory.join(format!("{program}{which}.log"));
        self.processes.push(Process::start(program, command, &log)?);
        Ok(())
    }

    /// Fails if a part of it has ended.
    pub fn check(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::check)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // The last started first: nothing writes into an etcd that has ended.
        while let Some(process) = self.processes.pop() {
            drop(process);
        }
    }
}

static PROGRAMS: OnceLock<String> = OnceLock::new();

/// Chooses the folder of `target` that holds the programs of Kubernetes, once.
pub fn choose(programs: &str) -> Result<()> {
    PROGRAMS.set(programs.to_owned()).ok().context("the programs are chosen already")
}

/// The folder of `target` that holds the programs of Kubernetes.
pub(super) fn programs() -> &'static str {
    PROGRAMS.get().map_or("cluster", String::as_str)
}

/// A built program.
pub fn binary(program: &str) -> Result<PathBuf> {
    let below = if program == "proxy-server" { "upstream" } else { programs() };
    there(target()?.with_file_name(below).join(program), "test cluster")
}
