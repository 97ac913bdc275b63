//! Owns an agent of ours with any flags, and steady load through it.
//! Called by tests of several servers, of rotation and of old releases.
//! Must never dial another address than those of an isolated namespace.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nodeguard::{
    report::{ask::ask, status::Status},
    tunnel::handle::StreamState,
};
use tokio::{sync::watch, task::JoinSet};

use super::eventually;
use crate::{
    bare::{POLICY, Place, Who},
    daemon::binary,
    load::{Load, request},
    process::Process,
};

/// A running agent of ours.
pub struct Agent {
    /// Its process.
    pub process: Process,
    admin: PathBuf,
}

/// A stream to a server, as the agent's status reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The server's id.
    pub server: String,
    /// `connected`, `draining` or what else it is.
    pub state: String,
    /// The number of the credentials that it was made with.
    pub made_with: u64,
}

impl Stream {
    /// Whether it takes dials.
    pub fn connected(&self) -> bool {
        self.state == "connected"
    }
}

/// How many of the streams take dials.
pub fn connected(streams: &[Stream]) -> usize {
    streams.iter().filter(|stream| stream.connected()).count()
}

impl Agent {
    /// Starts one with the lab's client certificate, for servers as `--proxy-server-host` names them.
    pub fn start(place: &Place, servers: &str, more: &[&str]) -> Result<Agent> {
        Agent::start_in(place, servers, more, &[])
    }

    /// The same with more variables in its environment.
    pub fn start_in(place: &Place, servers: &str, more: &[&str], variables: &[(&str, &str)]) -> Result<Agent> {
        let file = |name| place.certs.path(name).display().to_string();
        let certificate = [format!("--agent-cert={}", file("agent.crt")), format!("--agent-key={}", file("agent.key"))];
        let flags: Vec<&str> = certificate.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Agent::start_bare(place, servers, &flags, variables)
    }

    /// Starts one with the lab's policy and CA; how it proves who it is stands in the flags.
    pub fn start_bare(place: &Place, servers: &str, flags: &[&str], variables: &[(&str, &str)]) -> Result<Agent> {
        let (policy, admin) = (place.directory.join("policy.yaml"), place.directory.join("admin.sock"));
        std::fs::write(&policy, POLICY)?;
        let mut agent = Command::new(binary()?);
        agent.stdin(Stdio::null()).env("RUST_LOG", "info,audit=warn").envs(variables.iter().copied()).arg("agent");
        agent.arg("--policy").arg(policy).arg("--admin-socket").arg(&admin);
        agent.arg("--ca-cert").arg(place.certs.path("ca.crt")).arg(format!("--proxy-server-host={servers}"));
        agent.args([&format!("--agent-identifiers=ipv4={}", Who::Ours.address()), "--health-server-port=0"]);
        agent.args(["--drain-timeout=20s", "--sync-interval=100ms", "--sync-interval-cap=500ms"]).args(flags);
        Ok(Agent { process: Process::start("agent", agent, &place.directory.join("agent.log"))?, admin })
    }

    /// Its status.
    pub async fn status(&self) -> Result<Status> {
        Ok(ask(&self.admin).await?)
    }

    /// Its streams.
    pub async fn streams(&self) -> Result<Vec<Stream>> {
        let tunnel = self.status().await?.tunnel.context("no tunnel")?;
        let stream = |stream: StreamState| Stream {
            server: stream.server_id.unwrap_or_default(),
            state: stream.state.name().to_owned(),
            made_with: stream.made_with.unwrap_or(0),
        };
        Ok(tunnel.streams.into_iter().map(stream).collect())
    }

    /// Waits until a condition holds of its streams; returns how long that took.
    pub async fn until(
        &mut self,
        what: &str,
        patience: Duration,
        holds: impl Fn(&[Stream]) -> bool,
    ) -> Result<Duration> {
        let waited = eventually(what, patience, async || {
            self.process.check()?;
            Ok(holds(&self.streams().await.unwrap_or_default()))
        });
        match waited.await {
            Ok(took) => Ok(took),
            Err(error) => {
                let tunnel = self.status().await?.tunnel;
                Err(error.context(format!("the tunnel: {tunnel:#?}\n{}", self.process.printed())))
            }
        }
    }

    /// Waits until exactly these servers have a stream that takes dials.
    pub async fn connected(&mut self, servers: &[&str]) -> Result<Duration> {
        let mut wanted = servers.to_vec();
        wanted.sort_unstable();
        self.until(&format!("streams to {servers:?}"), Duration::from_secs(20), |streams| {
            let mut live: Vec<&str> =
                streams.iter().filter(|stream| stream.connected()).map(|stream| &*stream.server).collect();
            live.sort_unstable();
            live == wanted
        })
        .await
    }

    /// Waits until its log holds a text.
    pub async fn prints(&self, text: &str) -> Result<()> {
        let printed = eventually(text, Duration::from_secs(10), async || Ok(self.process.printed().contains(text)));
        printed.await.with_context(|| self.process.printed()).map(drop)
    }
}

/// Clients that send small requests all the time: over connections that stay open, and over new ones.
pub struct Steady {
    over: watch::Sender<bool>,
    clients: JoinSet<Result<usize>>,
}

impl Steady {
    /// Begins with so many clients that hold a connection, and so many that dial for each request.
    pub async fn start(load: &Load, held: usize, dialling: usize) -> Result<Steady> {
        let (over, end) = watch::channel(false);
        let mut clients = JoinSet::new();
        let held = load.connect_all(held).await?.into_iter().map(Some);
        for mut held in held.chain((0..dialling).map(|_| None)) {
            let (load, end) = (load.clone(), end.clone());
            clients.spawn(async move {
                let mut answered = 0;
                while !*end.borrow() {
                    match &mut held {
                        Some(stream) => request(stream).await.context("a held connection")?,
                        None => request(&mut load.connect().await?).await.context("a new connection")?,
                    }
                    answered += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(answered)
            });
        }
        Ok(Steady { over, clients })
    }

    /// Ends the load; returns how many requests were answered, if none failed.
    pub async fn end(mut self) -> Result<usize> {
        self.over.send_replace(true);
        let (mut answered, mut failed) = (0, Vec::new());
        while let Some(client) = self.clients.join_next().await {
            match client? {
                Ok(count) => answered += count,
                Err(error) => failed.push(format!("{error:#}")),
            }
        }
        ensure!(failed.is_empty(), "{} of the connections failed: {failed:?}", failed.len());
        Ok(answered)
    }
}
