//! Owns agents without a kernel half, ours and the upstream one, a real server for them, and what the kernel says of their processes.
//! Called by the tunnel bench and by tests under load.
//! Must never give one of them what the other does not get: same certificates, same server, an address each.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};

pub use crate::process::upstream;
use crate::{
    certs::Certs,
    process::{Process, built},
    servers::proxy_server::{AGENT_PORT, Spec},
};

/// Where everything of a run stands.
pub struct Place {
    /// Logs, sockets, certificates.
    pub directory: PathBuf,
    /// The certificates.
    pub certs: Certs,
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

/// Starts the real proxy-server; where its frontend listens.
pub fn server(place: &Place) -> Result<(Process, PathBuf)> {
    let more = ["--proxy-strategies=destHost", "--v=0"];
    let agents = SocketAddr::new(SERVER.parse()?, AGENT_PORT);
    let server = Spec { agents, more: &more, ..Spec::new("proxy-server", 0, 1) }.start(place)?;
    Ok((server.process, server.socket))
}

/// Starts an agent for a server.
pub fn agent(who: Who, place: &Place, port: u16) -> Result<Process> {
    agent_by(who, place, (SERVER, port), &[])
}

/// The same for a server by its name, with more variables in its environment.
pub fn agent_by(who: Who, place: &Place, server: (&str, u16), variables: &[(&str, &str)]) -> Result<Process> {
    let mut agent = match who {
        Who::Ours => ours_with(place, POLICY)?,
        Who::Theirs => command(&upstream("proxy-agent")?),
    };
    if who == Who::Ours {
        agent.env("RUST_LOG", "warn");
    }
    agent.envs(variables.iter().copied());
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
    let mut agent = command(&built("nodeguard")?);
    agent.args(["agent", "--policy"]).arg(file);
    Ok(agent)
}

fn start(who: Who, place: &Place, (host, port): (&str, u16), mut agent: Command) -> Result<Process> {
    let health = if who == Who::Ours { 18_101 } else { 18_102 };
    agent.args([format!("--proxy-server-host={host}"), format!("--proxy-server-port={port}")]);
    agent.args([format!("--agent-identifiers=ipv4={}", who.address()), "--v=0".to_owned()]);
    agent.args(["--health-server-host=127.0.0.1".to_owned(), format!("--health-server-port={health}")]);
    agent.args([format!("--admin-server-port={}", health + 100), "--sync-interval=100ms".to_owned()]);
    place.certs.give_to_agent(&mut agent);
    Process::start("agent", agent, &place.directory.join(format!("{who:?}.log")))
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

/// CPU time of a process so far, seconds. `/proc/PID/stat` counts in hundredths of a second, which is too coarse for a short turn.
pub fn cpu_of(id: u32) -> Result<f64> {
    let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(id.cast_signed()))?;
    Ok(Duration::from(clock.now()?).as_secs_f64())
}

/// A line of /proc/PID/status in KiB: `VmRSS` now, `VmHWM` the most so far.
pub fn memory(process: &Process, line: &str) -> Result<f64> {
    memory_of(process.id(), line)
}

/// The same by its number.
pub fn memory_of(id: u32, line: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let value = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':')?.split_whitespace().next());
    value.and_then(|text| text.parse().ok()).context("/proc/PID/status")
}
