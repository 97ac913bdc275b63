//! Owns the real proxy-server, of any release: its flags, and waiting until it listens.
//! Called by `lab`, and by tests that start several, stop one or give one another certificate.
//! Must never be a stand-in: the binaries are the upstream project's.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;

use crate::{
    bare::{Place, Who as Agents, upstream},
    certs::Certs,
    load::Load,
    net::Who,
    process::Process,
};

/// The port for agents in a lab.
pub const AGENT_PORT: u16 = 8091;

/// A proxy-server to start.
pub struct Spec<'a> {
    /// What it calls itself.
    pub id: &'a str,
    /// Where agents reach it.
    pub agents: SocketAddr,
    /// How many servers it claims there are.
    pub count: u32,
    /// Sets its health and admin ports apart from those of other servers.
    pub index: u16,
    /// A file of `target/upstream`.
    pub binary: &'a str,
    /// The file with the CA that agents' certificates have to come from.
    pub client_ca: &'a str,
    /// Agents show a token instead, which the server reviews with this API.
    pub kubeconfig: Option<PathBuf>,
    /// More flags. A flag that is given twice has its last value.
    pub more: &'a [&'a str],
}

impl<'a> Spec<'a> {
    /// The server with this number, at the lab's address.
    pub fn new(id: &'a str, index: u16, count: u32) -> Spec<'a> {
        let agents = SocketAddr::from((Who::ControlPlane.v4(), 8191 + index));
        Spec { id, agents, count, index, binary: "proxy-server", client_ca: "ca.crt", kubeconfig: None, more: &[] }
    }

    /// The only one, at the port for agents in a lab.
    pub fn alone() -> Spec<'a> {
        let agents = SocketAddr::from((Who::ControlPlane.v4(), AGENT_PORT));
        Spec { agents, ..Spec::new("proxy-server", 0, 1) }
    }

    /// Starts it in this network namespace, and waits until it listens.
    pub fn start(&self, place: &Place) -> Result<ProxyServer> {
        let mut server = self.run(Command::new(upstream(self.binary)?), &place.certs, &place.directory)?;
        let listens = |_: &Process| Ok(std::net::TcpStream::connect(self.agents).is_ok());
        server.process.until("it takes agents", Duration::from_secs(20), listens)?;
        Ok(server)
    }

    /// Starts it by such a command, and waits until its frontend listens.
    pub fn run(&self, mut command: Command, certs: &Certs, directory: &Path) -> Result<ProxyServer> {
        let socket = directory.join(format!("{}.sock", self.id));
        if socket.exists() {
            std::fs::remove_file(&socket)?;
        }
        command.args(["--mode=http-connect", "--server-port=0", "--proxy-strategies=destHost,default"]).args([
            format!("--server-id={}", self.id),
            format!("--server-count={}", self.count),
            format!("--uds-name={}", socket.display()),
            format!("--agent-bind-address={}", self.agents.ip()),
            format!("--agent-port={}", self.agents.port()),
            format!("--health-bind-address={}", Ipv4Addr::LOCALHOST),
            format!("--health-port={}", 8300 + 2 * self.index),
            format!("--admin-bind-address={}", Ipv4Addr::LOCALHOST),
            format!("--admin-port={}", 8301 + 2 * self.index),
        ]);
        command.args(certs.options([("cluster-cert", "server.crt"), ("cluster-key", "server.key")]));
        match &self.kubeconfig {
            None => command.args(certs.options([("cluster-ca-cert", self.client_ca)])),
            Some(path) => command.arg(format!("--kubeconfig={}", path.display())).args([
                "--agent-namespace=kube-system",
                "--agent-service-account=konnectivity-agent",
                "--authentication-audience=system:konnectivity-server",
                "--kubeconfig-qps=100",
                "--kubeconfig-burst=100",
            ]),
        };
        command.args(self.more);
        let mut process = Process::start(self.id, command, &directory.join(format!("{}.log", self.id)))?;
        process.until("it listens", Duration::from_secs(20), |_| Ok(UnixStream::connect(&socket).is_ok()))?;
        Ok(ProxyServer { process, socket })
    }
}

/// A running proxy-server.
pub struct ProxyServer {
    /// Its process.
    pub process: Process,
    /// Where the API server would connect: HTTP CONNECT over a Unix socket.
    pub socket: PathBuf,
}

impl ProxyServer {
    /// The way to our agent's endpoint through it.
    pub fn load(&self) -> Load {
        self.load_at(Agents::Ours.address())
    }

    /// The way to the endpoint of the agent that advertises an address.
    pub fn load_at(&self, address: &str) -> Load {
        Load { socket: Arc::from(self.socket.as_path()), destination: format!("{address}:7000") }
    }
}
