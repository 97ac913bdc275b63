//! Owns several real proxy-servers at once, of any release, a TCP balancer in front of them, and an agent with any flags.
//! Called by tests of the server set, of rotation and of old releases.
//! Must never stand on another address than those of an isolated namespace.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nodeguard::report::{admin, status::Status};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

use crate::{
    bare::{POLICY, Place, SERVER, Who, upstream},
    daemon::binary,
    load::Load,
    process::{Process, until},
};

/// A proxy-server to start.
pub struct Spec<'a> {
    /// What it calls itself.
    pub id: &'a str,
    /// Where agents reach it.
    pub agents: SocketAddr,
    /// How many servers it says there are.
    pub count: u32,
    /// Sets its other ports apart.
    pub index: u16,
    /// A file of `target/upstream`.
    pub binary: &'a str,
    /// The file with the CA that agents' certificates have to come from.
    pub client_ca: &'a str,
    /// Agents show a token instead, which it asks this API about.
    pub kubeconfig: Option<PathBuf>,
    /// More flags.
    pub more: &'a [&'a str],
}

impl<'a> Spec<'a> {
    /// The server of such a number, at the lab's address.
    pub fn new(id: &'a str, index: u16, count: u32) -> Spec<'a> {
        let agents = SocketAddr::new(SERVER.parse().unwrap_or(std::net::Ipv4Addr::LOCALHOST.into()), 8191 + index);
        Spec { id, agents, count, index, binary: "proxy-server", client_ca: "ca.crt", kubeconfig: None, more: &[] }
    }

    /// Starts it and waits until it listens.
    pub fn start(&self, place: &Place) -> Result<Server> {
        let socket = place.directory.join(format!("{}.sock", self.id));
        if socket.exists() {
            std::fs::remove_file(&socket)?;
        }
        let mut server = Command::new(upstream(self.binary)?);
        server.stdin(Stdio::null()).args([
            "--mode=http-connect",
            "--server-port=0",
            "--proxy-strategies=destHost,default",
        ]);
        server.args([
            format!("--server-id={}", self.id),
            format!("--server-count={}", self.count),
            format!("--uds-name={}", socket.display()),
            format!("--agent-bind-address={}", self.agents.ip()),
            format!("--agent-port={}", self.agents.port()),
            "--health-bind-address=127.0.0.1".to_owned(),
            format!("--health-port={}", 8300 + 2 * self.index),
            "--admin-bind-address=127.0.0.1".to_owned(),
            format!("--admin-port={}", 8301 + 2 * self.index),
            format!("--cluster-cert={}", place.certs.path("server.crt").display()),
            format!("--cluster-key={}", place.certs.path("server.key").display()),
        ]);
        match &self.kubeconfig {
            None => server.arg(format!("--cluster-ca-cert={}", place.certs.path(self.client_ca).display())),
            Some(path) => server.args([
                format!("--kubeconfig={}", path.display()),
                "--agent-namespace=kube-system".to_owned(),
                "--agent-service-account=konnectivity-agent".to_owned(),
                "--authentication-audience=system:konnectivity-server".to_owned(),
                "--kubeconfig-qps=100".to_owned(),
                "--kubeconfig-burst=100".to_owned(),
            ]),
        };
        server.args(self.more);
        let log = place.directory.join(format!("{}.log", self.id));
        let mut process = Process::start(self.id, server, &log)?;
        until("the proxy-server listens", Duration::from_secs(20), || {
            process.check()?;
            let frontend = std::os::unix::net::UnixStream::connect(&socket).is_ok();
            Ok(frontend && std::net::TcpStream::connect(self.agents).is_ok())
        })?;
        Ok(Server { process, socket })
    }
}

/// A running proxy-server.
pub struct Server {
    /// Its process.
    pub process: Process,
    socket: PathBuf,
}

impl Server {
    /// The way to this node through it.
    pub fn load(&self) -> Load {
        Load { socket: Arc::from(self.socket.as_path()), destination: format!("{}:7000", Who::Ours.address()) }
    }
}

/// A running agent of ours.
pub struct Agent {
    /// Its process.
    pub process: Process,
    admin: PathBuf,
}

impl Agent {
    /// Starts one with the lab's policy and these flags.
    pub fn start(place: &Place, flags: &[String]) -> Result<Agent> {
        Agent::start_in(place, flags, &[])
    }

    /// The same with more variables in its environment.
    pub fn start_in(place: &Place, flags: &[String], variables: &[(&str, &str)]) -> Result<Agent> {
        let (policy, admin) = (place.directory.join("policy.yaml"), place.directory.join("admin.sock"));
        std::fs::write(&policy, POLICY)?;
        let mut agent = Command::new(binary()?);
        agent.stdin(Stdio::null()).env("RUST_LOG", "info,audit=warn").envs(variables.iter().copied()).arg("agent");
        agent.arg("--policy").arg(policy).arg("--admin-socket").arg(&admin);
        agent.args([format!("--agent-identifiers=ipv4={}", Who::Ours.address()), "--health-server-port=0".to_owned()]);
        agent.args([format!("--ca-cert={}", place.certs.path("ca.crt").display()), "--drain-timeout=20s".to_owned()]);
        agent.args(["--sync-interval=100ms", "--sync-interval-cap=500ms"]).args(flags);
        Ok(Agent { process: Process::start("agent", agent, &place.directory.join("agent.log"))?, admin })
    }

    /// The flags for the lab's client certificate.
    pub fn with_certificate(place: &Place) -> Vec<String> {
        ["cert", "key"]
            .map(|what| {
                let file = if what == "cert" { "agent.crt" } else { "agent.key" };
                format!("--agent-{what}={}", place.certs.path(file).display())
            })
            .to_vec()
    }

    /// What it says of itself.
    pub async fn status(&self) -> Result<Status> {
        Ok(admin::ask(&self.admin).await?)
    }

    /// The server, state and number of each stream.
    pub async fn streams(&self) -> Result<Vec<(String, String, u64)>> {
        let status = self.status().await?;
        let all = status.tunnel.get("streams").and_then(|streams| streams.as_array()).cloned().unwrap_or_default();
        let text = |stream: &serde_json::Value, name: &str| {
            stream.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned()
        };
        let number = |stream: &serde_json::Value| stream.get("madeWith").and_then(|value| value.as_u64()).unwrap_or(0);
        Ok(all.iter().map(|stream| (text(stream, "serverId"), text(stream, "state"), number(stream))).collect())
    }

    /// Waits until its streams are so; how long that took.
    pub async fn until(
        &mut self,
        what: &str,
        patience: Duration,
        is_so: impl Fn(&[(String, String, u64)]) -> bool,
    ) -> Result<Duration> {
        let started = Instant::now();
        loop {
            self.process.check()?;
            let streams = self.streams().await.unwrap_or_default();
            if is_so(&streams) {
                return Ok(started.elapsed());
            }
            if started.elapsed() > patience {
                let said = self.status().await?.tunnel;
                bail!("not within {patience:?}: {what}; the tunnel: {said:#}\n{}", self.process.printed());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until exactly these servers have a stream that takes dials.
    pub async fn connected(&mut self, servers: &[&str]) -> Result<Duration> {
        let mut wanted: Vec<String> = servers.iter().map(ToString::to_string).collect();
        wanted.sort();
        self.until(&format!("streams to {servers:?}"), Duration::from_secs(20), |streams| {
            let mut live: Vec<String> = streams
                .iter()
                .filter(|(_, state, _)| state == "connected")
                .map(|(server, _, _)| server.clone())
                .collect();
            live.sort();
            live == wanted
        })
        .await
    }
}

/// A TCP balancer: each connection goes to the next backend that answers.
pub struct Balancer {
    backends: Arc<Mutex<Vec<SocketAddr>>>,
    cut: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Balancer {
    /// Listens in front of these.
    pub async fn start(address: SocketAddr, backends: &[SocketAddr]) -> Result<Balancer> {
        let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
        let backends = Arc::new(Mutex::new(backends.to_vec()));
        let (cut, cuts) = watch::channel(());
        let shared = Arc::clone(&backends);
        let task = tokio::spawn(async move {
            let mut turn = 0usize;
            while let Ok((mut near, _)) = listener.accept().await {
                let all = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
                turn += 1;
                let mut cuts = cuts.clone();
                cuts.mark_unchanged();
                tokio::spawn(async move {
                    for attempt in 0..all.len() {
                        let Some(backend) = all.get((turn + attempt) % all.len()) else { continue };
                        let Ok(mut far) = TcpStream::connect(backend).await else { continue };
                        tokio::select! {
                            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                            _ = cuts.changed() => {}
                        }
                        return;
                    }
                });
            }
        });
        Ok(Balancer { backends, cut, task })
    }

    /// From the next connection on, these.
    pub fn set(&self, backends: &[SocketAddr]) {
        *self.backends.lock().unwrap_or_else(PoisonError::into_inner) = backends.to_vec();
    }

    /// Ends every connection.
    pub fn cut(&self) {
        self.cut.send_replace(());
    }
}

/// Connections that are held and asked all the time, and others that come and go; each failure counts.
pub struct Steady {
    over: watch::Sender<bool>,
    clients: tokio::task::JoinSet<Result<usize>>,
}

impl Steady {
    /// Begins with so many held ones and so many clients that dial anew each time.
    pub async fn start(load: &Load, held: usize, dialling: usize) -> Result<Steady> {
        let (over, end) = watch::channel(false);
        let mut clients = tokio::task::JoinSet::new();
        for mut stream in load.connect_all(held).await? {
            let end = end.clone();
            clients.spawn(async move {
                let mut asked = 0;
                while !*end.borrow() {
                    crate::load::request(&mut stream).await.context("a held connection")?;
                    asked += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(asked)
            });
        }
        for _ in 0..dialling {
            let (load, end) = (load.clone(), end.clone());
            clients.spawn(async move {
                let mut asked = 0;
                while !*end.borrow() {
                    let mut stream = load.connect().await.context("a new dial")?;
                    crate::load::request(&mut stream).await.context("a new connection")?;
                    asked += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(asked)
            });
        }
        Ok(Steady { over, clients })
    }

    /// Ends it; how many requests were answered, if none failed.
    pub async fn end(mut self) -> Result<usize> {
        self.over.send_replace(true);
        let (mut asked, mut failed) = (0, Vec::new());
        while let Some(client) = self.clients.join_next().await {
            match client? {
                Ok(count) => asked += count,
                Err(error) => failed.push(format!("{error:#}")),
            }
        }
        ensure!(failed.is_empty(), "{} of the connections failed: {failed:?}", failed.len());
        Ok(asked)
    }
}
