//! Owns agents without a kernel half, ours and the upstream one, a real server for them, and what the kernel says of their processes.
//! Called by the tunnel bench, and by tests of load, of several servers, of rotation and of old releases.
//! Must never give one of them what the other does not get: same certificates, same server, an address each.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nodeguard::{
    report::{ask::ask, status::Status},
    tunnel::handle::{StreamPhase, StreamState},
};

pub use crate::process::upstream;
use crate::{
    certs::{Certs, ServerCert},
    net::isolated,
    process::{Process, built},
    servers::{
        eventually,
        proxy_server::{ProxyServer, Spec},
    },
};

/// Where everything of a run stands.
pub struct Place {
    /// Logs, sockets, certificates.
    pub directory: PathBuf,
    /// The certificates.
    pub certs: Certs,
}

impl Place {
    /// Runs code in namespaces of its own, on a runtime, with certificates. Loopback has the server's address, that of our agent's node, and these.
    pub fn with<T: Send>(more: &[&str], code: impl AsyncFnOnce(&mut Place) -> Result<T> + Send) -> Result<T> {
        let directory = tempfile::tempdir()?;
        let addresses: Vec<&str> = [SERVER, Who::Ours.address()].iter().chain(more).copied().collect();
        isolated(&addresses, || {
            let mut place = Place { directory: directory.path().to_path_buf(), certs: Certs::new(directory.path())? };
            place.certs.server(ServerCert::Good)?;
            runtime()?.block_on(code(&mut place))
        })
    }
}

/// A runtime for many connections.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// This project's agent.
    Ours,
    /// The upstream project's.
    Theirs,
}

impl Who {
    /// Both, in the order of an even round.
    pub const BOTH: [Who; 2] = [Who::Ours, Who::Theirs];

    /// The address that the server takes for this agent's node.
    pub fn address(self) -> &'static str {
        match self {
            Who::Ours => "10.0.0.2",
            Who::Theirs => "10.0.0.3",
        }
    }
}

/// The proxy-server's address for agents.
pub const SERVER: &str = "10.0.0.1";
/// Lets the control plane dial the endpoint, and nothing else.
pub const POLICY: &str = "\
apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata: {name: bench}
spec:
  mode: Enforce
  guard: []
  tunnel: {dial: [{pods: {cidrs: [10.0.0.0/24], ports: [7000]}}]}
";

/// Starts the real proxy-server.
pub fn server(place: &Place) -> Result<ProxyServer> {
    let more = ["--proxy-strategies=destHost", "--v=0"];
    Spec { more: &more, ..Spec::alone() }.start(place)
}

/// Starts an agent for a server.
pub fn agent(who: Who, place: &Place, port: u16) -> Result<Process> {
    agent_by(who, place, (SERVER, port), &[])
}

/// The same for a server by its name, with more variables in its environment.
pub fn agent_by(who: Who, place: &Place, server: (&str, u16), variables: &[(&str, &str)]) -> Result<Process> {
    let mut agent = match who {
        Who::Ours => ours_with(place, POLICY)?,
        Who::Theirs => Command::new(upstream("proxy-agent")?),
    };
    agent.env("RUST_LOG", "warn").envs(variables.iter().copied());
    start(who, place, server, agent)
}

/// Starts this project's agent with a policy and more arguments.
pub fn ours(place: &Place, port: u16, policy: &str, more: &[&str]) -> Result<Process> {
    let mut agent = ours_with(place, policy)?;
    agent.args(more);
    start(Who::Ours, place, (SERVER, port), agent)
}

fn ours_with(place: &Place, policy: &str) -> Result<Command> {
    let file = place.directory.join("policy.yaml");
    fs::write(&file, policy)?;
    let mut agent = Command::new(built("nodeguard")?);
    agent.env_remove("RUST_LOG").args(["agent", "--policy"]).arg(file);
    Ok(agent)
}

fn start(who: Who, place: &Place, (host, port): (&str, u16), mut agent: Command) -> Result<Process> {
    let health = if who == Who::Ours { 18_101 } else { 18_102 };
    agent.args([format!("--proxy-server-host={host}"), format!("--proxy-server-port={port}")]);
    agent.args([format!("--agent-identifiers=ipv4={}", who.address()), "--v=0".to_owned()]);
    agent.args(["--health-server-host=127.0.0.1".to_owned(), format!("--health-server-port={health}")]);
    agent.args([format!("--admin-server-port={}", health + 100), "--sync-interval=100ms".to_owned()]);
    agent.args(place.certs.of_agent());
    Process::start("agent", agent, &place.directory.join(format!("{who:?}.log")))
}

/// An agent of ours with any flags, which is asked for its status.
pub struct Agent {
    /// Its process.
    pub process: Process,
    admin: PathBuf,
}

/// The streams that take dials.
pub fn connected(streams: &[StreamState]) -> Vec<&StreamState> {
    streams.iter().filter(|stream| stream.state == StreamPhase::Connected).collect()
}

impl Agent {
    /// Starts one with the lab's client certificate, for servers as `--proxy-server-host` names them.
    pub fn start(place: &Place, servers: &str, more: &[&str]) -> Result<Agent> {
        Agent::start_in(place, servers, more, &[])
    }

    /// The same with more variables in its environment.
    pub fn start_in(place: &Place, servers: &str, more: &[&str], variables: &[(&str, &str)]) -> Result<Agent> {
        let certificate = place.certs.options([("agent-cert", "agent.crt"), ("agent-key", "agent.key")]);
        let flags: Vec<&str> = certificate.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Agent::start_bare(place, servers, &flags, variables)
    }

    /// Starts one with the lab's policy and CA; how it proves who it is stands in the flags.
    pub fn start_bare(place: &Place, servers: &str, flags: &[&str], variables: &[(&str, &str)]) -> Result<Agent> {
        let admin = place.directory.join("admin.sock");
        let mut agent = ours_with(place, POLICY)?;
        agent.env("RUST_LOG", "info,audit=warn").envs(variables.iter().copied()).arg("--admin-socket").arg(&admin);
        agent.args(place.certs.options([("ca-cert", "ca.crt")])).arg(format!("--proxy-server-host={servers}"));
        agent.args([&format!("--agent-identifiers=ipv4={}", Who::Ours.address()), "--health-server-port=0"]);
        agent.args(["--drain-timeout=20s", "--sync-interval=100ms", "--sync-interval-cap=500ms"]).args(flags);
        Ok(Agent { process: Process::start("agent", agent, &place.directory.join("agent.log"))?, admin })
    }

    /// Its status.
    pub async fn status(&self) -> Result<Status> {
        Ok(ask(&self.admin).await?)
    }

    /// Its streams.
    pub async fn streams(&self) -> Result<Vec<StreamState>> {
        Ok(self.status().await?.tunnel.context("no tunnel")?.streams)
    }

    /// Waits until a condition holds of its streams; returns how long that took.
    pub async fn until(
        &mut self,
        what: &str,
        patience: Duration,
        holds: impl Fn(&[StreamState]) -> bool,
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
                connected(streams).iter().filter_map(|stream| stream.server_id.as_deref()).collect();
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

/// CPU time of a process so far, seconds. `/proc/PID/stat` counts in hundredths of a second, which is too coarse for a short turn.
pub fn cpu_of(id: u32) -> Result<f64> {
    let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(id.cast_signed()))?;
    Ok(Duration::from(clock.now()?).as_secs_f64())
}

/// A line of /proc/PID/status in KiB: `VmRSS` now, `VmHWM` the most so far.
pub fn memory(id: u32, line: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let value = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':')?.split_whitespace().next());
    value.and_then(|text| text.parse().ok()).context("/proc/PID/status")
}
