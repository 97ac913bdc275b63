//! Owns the control plane: etcd, kube-apiserver with an egress selector, proxy-server, controller manager, scheduler.
//! Called by `main`.
//! Must never be able to open a connection to the node: its namespace's packet filter sees to that.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::process::{Process, until};

use crate::{
    addresses::at,
    kubectl::Kubectl,
    pki::{Pki, text},
    place::{Place, Where},
};

/// The protocol between kube-apiserver and proxy-server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Egress {
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
pub(crate) struct Front {
    /// Its port.
    pub(crate) port: u16,
    /// Where the proxy-server behind it takes agents; without, it dials nodes and pods itself.
    pub(crate) agents: Option<u16>,
    /// The protocol between the two.
    pub(crate) egress: Egress,
    /// How the proxy-server chooses an agent.
    pub(crate) strategies: &'static str,
}

impl Front {
    /// The cluster's own.
    fn own(egress: Egress, strategies: &'static str) -> Front {
        Front { port: 6443, agents: Some(8132), egress, strategies }
    }

    fn socket(&self, place: &Place) -> Result<String> {
        text(&place.directory.join(format!("konnectivity-{}.sock", self.port)))
    }
}

/// A running control plane.
pub(crate) struct Control {
    /// In the order in which they are ended.
    processes: Vec<Process>,
}

/// The names that mean something else on the node are harmless ones here: the API server looks before it dials (CVE-2020-8562).
fn hosts() -> String {
    format!("127.0.0.1 localhost\n{} worker-1 metadata.lab loopback.lab\n", at().node)
}

/// How the proxy-server chooses an agent: by the address that is dialled, else any.
pub(crate) const STRATEGIES: &str = "destHost,default";

/// How long a program may take to start on a machine that others use too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

impl Control {
    /// Starts it and waits until the API server is ready.
    pub(crate) fn start(place: &Place, pki: &Pki, egress: Egress) -> Result<Control> {
        let mut control = Control { processes: Vec::new() };
        control.run(place, "etcd", "", &etcd(place)?)?;
        control.front(place, pki, &Front::own(egress, STRATEGIES))?;
        let kubectl = Kubectl::new(place, pki)?;
        until("kube-apiserver is ready", PATIENCE, || {
            control.check()?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(kubectl.run(&["get", "--raw", "/readyz"]).is_ok())
        })?;
        for (program, user) in [("kube-controller-manager", "controller-manager"), ("kube-scheduler", "scheduler")] {
            control.run(place, program, "", &controller(pki, program, user)?)?;
        }
        Ok(control)
    }

    /// The two that know the egress protocol.
    fn front(&mut self, place: &Place, pki: &Pki, front: &Front) -> Result<()> {
        let which = if front.port == 6443 { String::new() } else { format!("-{}", front.port) };
        if let Some(agents) = front.agents {
            self.run(place, "proxy-server", &which, &proxy_server(place, pki, front, agents)?)?;
        }
        self.run(place, "kube-apiserver", &which, &api_server(place, pki, front)?)
    }

    /// One more way to the same cluster.
    pub(crate) fn add(&mut self, place: &Place, pki: &Pki, front: &Front) -> Result<()> {
        self.front(place, pki, front)
    }

    fn run(&mut self, place: &Place, program: &str, which: &str, arguments: &[String]) -> Result<()> {
        // What a name means here is said by a file; there is no name server.
        let hosts = place.directory.join("control-hosts");
        fs::write(&hosts, self::hosts())?;
        let mut command = place.command(Path::new("/usr/bin/unshare"), Where::Control)?;
        command.args(["--mount", "--", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
        command.arg(hosts).arg(binary(program)?).args(arguments).env("PROXY_SERVER_ID", "lab");
        let log = place.directory.join(format!("{program}{which}.log"));
        self.processes.push(Process::start(program, command, &log)?);
        Ok(())
    }

    /// Fails if a part of it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::check)
    }
}

static PROGRAMS: OnceLock<String> = OnceLock::new();

/// Chooses the folder of `target` that the programs of Kubernetes are in, once.
pub(crate) fn choose(programs: &str) -> Result<()> {
    PROGRAMS.set(programs.to_owned()).ok().context("the programs are chosen already")
}

/// The folder of `target` that the programs of Kubernetes are in.
pub(crate) fn programs() -> &'static str {
    PROGRAMS.get().map_or("cluster", String::as_str)
}

/// A built program.
pub(crate) fn binary(program: &str) -> Result<PathBuf> {
    let target = lab::lab::target()?;
    let below = if program == "proxy-server" { "upstream" } else { programs() };
    let binary = target.with_file_name(below).join(program);
    ensure!(binary.is_file(), "{} is missing: `cargo xtask test cluster` builds it", binary.display());
    Ok(binary)
}

fn etcd(place: &Place) -> Result<Vec<String>> {
    let data = text(&place.directory.join("etcd"))?;
    Ok([
        "--name=lab",
        &format!("--data-dir={data}"),
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=lab=http://127.0.0.1:2380",
        "--log-level=warn",
        "--unsafe-no-fsync",
    ]
    .map(str::to_owned)
    .to_vec())
}

fn api_server(place: &Place, pki: &Pki, front: &Front) -> Result<Vec<String>> {
    let mut arguments: Vec<String> = [
        "--etcd-servers=http://127.0.0.1:2379",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--kubelet-preferred-address-types=InternalIP,Hostname",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-allowed-names=front-proxy-client",
        "--shutdown-delay-duration=0s",
        "-v=1",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.push(format!("--service-cluster-ip-range={}", at().services));
    arguments.push(format!("--advertise-address={}", at().control));
    arguments.push("--bind-address=::".to_owned());
    arguments.push(format!("--secure-port={}", front.port));
    if front.agents.is_some() {
        arguments.push(format!("--egress-selector-config-file={}", egress_selector(place, front)?));
    }
    if front.port != 6443 {
        // The service of the API server stays the first one's.
        arguments.push("--endpoint-reconciler-type=none".to_owned());
    }
    for (flag, file) in [
        ("client-ca-file", "ca.crt"),
        ("kubelet-certificate-authority", "ca.crt"),
        ("requestheader-client-ca-file", "ca.crt"),
        ("tls-cert-file", "apiserver.crt"),
        ("tls-private-key-file", "apiserver.key"),
        ("kubelet-client-certificate", "apiserver-kubelet-client.crt"),
        ("kubelet-client-key", "apiserver-kubelet-client.key"),
        ("proxy-client-cert-file", "front-proxy-client.crt"),
        ("proxy-client-key-file", "front-proxy-client.key"),
        ("service-account-key-file", "service-account.crt"),
        ("service-account-signing-key-file", "service-account.key"),
    ] {
        arguments.push(format!("--{flag}={}", pki.text(file)?));
    }
    Ok(arguments)
}

fn egress_selector(place: &Place, front: &Front) -> Result<String> {
    let (socket, config) = (front.socket(place)?, place.directory.join(format!("egress-{}.yaml", front.port)));
    let protocol = match front.egress {
        Egress::Grpc => "GRPC",
        Egress::HttpConnect => "HTTPConnect",
    };
    fs::write(
        &config,
        format!(
            "apiVersion: apiserver.k8s.io/v1beta1\nkind: EgressSelectorConfiguration\negressSelections:\n\
            - name: cluster\n  connection:\n    proxyProtocol: {protocol}\n    transport: {{uds: {{udsName: {socket}}}}}\n"
        ),
    )?;
    text(&config)
}

/// Agents prove themselves by service-account tokens, which the API server is asked about.
fn proxy_server(place: &Place, pki: &Pki, front: &Front, agents: u16) -> Result<Vec<String>> {
    let mode = match front.egress {
        Egress::Grpc => "grpc",
        Egress::HttpConnect => "http-connect",
    };
    let mut arguments: Vec<String> = [
        "--server-port=0",
        "--agent-namespace=kube-system",
        "--agent-service-account=nodeguard",
        "--authentication-audience=system:konnectivity-server",
        "--server-count=1",
        "--health-bind-address=127.0.0.1",
        "--admin-bind-address=127.0.0.1",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend([
        format!("--mode={mode}"),
        format!("--proxy-strategies={}", front.strategies),
        format!("--uds-name={}", front.socket(place)?),
        format!("--agent-port={agents}"),
        format!("--admin-port={}", agents + 1),
        format!("--health-port={}", agents + 2),
        format!("--agent-bind-address={}", at().control),
        format!("--cluster-cert={}", pki.text("proxy-server-tls.crt")?),
        format!("--cluster-key={}", pki.text("proxy-server-tls.key")?),
        format!("--kubeconfig={}", pki.text("proxy-server.kubeconfig")?),
    ]);
    Ok(arguments)
}

fn controller(pki: &Pki, program: &str, user: &str) -> Result<Vec<String>> {
    let kubeconfig = pki.text(&format!("{user}.kubeconfig"))?;
    let mut arguments: Vec<String> = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"]
        .map(|flag| format!("--{flag}={kubeconfig}"))
        .to_vec();
    arguments.extend(["--leader-elect=false", "--bind-address=127.0.0.1", "-v=1"].map(str::to_owned));
    if program == "kube-controller-manager" {
        arguments.push("--use-service-account-credentials=true".to_owned());
        arguments.push(format!("--root-ca-file={}", pki.text("ca.crt")?));
        arguments.push(format!("--service-account-private-key-file={}", pki.text("service-account.key")?));
    }
    Ok(arguments)
}

impl Drop for Control {
    fn drop(&mut self) {
        // The last started first: nothing writes into an etcd that is gone.
        while let Some(process) = self.processes.pop() {
            drop(process);
        }
    }
}

impl Control {
    /// The same cluster with another protocol, or another choice of agents: what knows these is ended and started.
    pub(crate) fn change_front(
        &mut self,
        place: &Place,
        pki: &Pki,
        egress: Egress,
        strategies: &'static str,
    ) -> Result<()> {
        let front = |process: &Process| {
            let log = process.log.file_name().unwrap_or_default();
            log == "proxy-server.log" || log == "kube-apiserver.log"
        };
        self.processes.retain(|process| !front(process));
        self.front(place, pki, &Front::own(egress, strategies))?;
        let kubectl = Kubectl::new(place, pki)?;
        until("kube-apiserver is ready again", PATIENCE, || {
            self.check()?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(kubectl.run(&["get", "--raw", "/readyz"]).is_ok())
        })
        .context("after proxy-server and kube-apiserver were started anew")
    }
}
