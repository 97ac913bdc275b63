//! Owns the guard of a lab: the real binary, with the options that keep it inside the lab, and what it may do.
//! Called by the lab, and by tests that kill it, edit its policy or read its status.
//! Must never attach outside the lab's own cgroup.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nodeguard::report::status::Status;
pub use nodeguard::tunnel::handle::{StreamPhase, StreamState};

use super::{Lab, net::Who};
use crate::{
    process::{Process, Said, built, command, output, until},
    servers::proxy_server::AGENT_PORT,
};

/// A running guard.
pub struct Daemon {
    /// Its process.
    pub process: Process,
    directory: PathBuf,
}

/// How the next guard is started.
#[derive(Default)]
pub struct Setup {
    /// Which build of it.
    pub build: Build,
    /// Where it looks for the proxy-server, if not where one is.
    pub agent_port: Option<u16>,
    /// What it may do.
    pub rights: Rights,
    /// More of its options.
    pub options: Vec<&'static str>,
    /// More of its environment.
    pub variables: Vec<(&'static str, &'static str)>,
}

/// What a guard may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rights {
    /// Everything.
    #[default]
    Root,
    /// `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_PERFMON`, as a user of its own that can gain nothing more.
    Three,
}

/// The user of a guard with three capabilities: the one that images without a root have.
pub const USER: u32 = 65_532;

/// What `setpriv` leaves to a program that it starts.
const THREE: [&str; 7] = [
    "--reuid=65532",
    "--regid=65532",
    "--clear-groups",
    "--bounding-set=-all,+bpf,+net_admin,+perfmon",
    "--inh-caps=-all,+bpf,+net_admin,+perfmon",
    "--ambient-caps=-all,+bpf,+net_admin,+perfmon",
    "--no-new-privs",
];

fn give_to_user(path: &Path) -> Result<()> {
    chown(path, Some(USER), Some(USER)).with_context(|| path.display().to_string())?;
    if fs::symlink_metadata(path)?.is_dir() {
        fs::read_dir(path)?.try_for_each(|entry| give_to_user(&entry?.path()))?;
    }
    Ok(())
}

/// A build of the guard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Build {
    /// The one that is released.
    #[default]
    Own,
    /// One whose maps have another layout.
    OtherAbi,
}

impl Build {
    /// The other one.
    pub fn other(self) -> Build {
        if self == Build::Own { Build::OtherAbi } else { Build::Own }
    }
}

impl Lab {
    /// The command that starts the guard: it runs in the node's cgroup and attaches to it.
    pub fn daemon_command(&self) -> Result<Command> {
        let Lab { net, certs, directory, setup, guarded: cgroup, .. } = self;
        let binary = built(if setup.build == Build::Own { "nodeguard" } else { "nodeguard-other-abi" })?;
        let namespace = net.open(Who::Node)?;
        let mut run = if setup.rights == Rights::Root {
            command(&binary, namespace, cgroup)?
        } else {
            give_to_user(directory)?;
            let mut run = command(Path::new("/usr/bin/setpriv"), namespace, cgroup)?;
            run.args(THREE).arg(binary);
            run
        };
        run.arg("run").arg("--cgroup").arg(cgroup).arg("--policy").arg(directory.join("policy/policy.yaml"));
        run.arg("--bpffs").arg(directory.join("bpf/nodeguard"));
        run.arg("--admin-socket").arg(directory.join("admin.sock"));
        run.args(["--node-name=node", "--health-server-host=127.0.0.1", "--drain-timeout=3s"]);
        run.args(["--sync-interval=100ms", "--sync-interval-cap=500ms"]);
        run.arg(format!("--proxy-server-host={}", Who::ControlPlane.v4()));
        run.arg(format!("--proxy-server-port={}", setup.agent_port.unwrap_or(AGENT_PORT)));
        run.args(certs.of_agent());
        run.env("RUST_BACKTRACE", "1").env_remove("RUST_LOG").envs(setup.variables.iter().copied());
        run.args(&setup.options);
        Ok(run)
    }
}

impl Daemon {
    /// Starts one and waits until its policy is in force.
    pub fn start(command: Command, directory: &Path) -> Result<Daemon> {
        let process = Process::start("nodeguard", command, &directory.join("nodeguard.log"))?;
        let mut daemon = Daemon { process, directory: directory.to_path_buf() };
        until("nodeguard answers", Duration::from_secs(20), || {
            daemon.process.check()?;
            Ok(daemon.status().is_ok_and(|status| status.daemon))
        })?;
        Ok(daemon)
    }

    /// Waits until its tunnel is up.
    pub fn connected(&mut self) -> Result<()> {
        until("the tunnel is connected", Duration::from_secs(20), || {
            self.process.check()?;
            Ok(stream(&self.status()?).state == StreamPhase::Connected)
        })
        .with_context(|| self.process.printed())
    }

    /// What `nodeguard status -o json` says.
    pub fn status(&self) -> Result<Status> {
        let said = self.said("status", &["-o", "json"])?.good().context("nodeguard status")?;
        Ok(serde_json::from_slice(&said.out)?)
    }

    /// What a command of `nodeguard` about this guard says.
    pub fn said(&self, name: &str, more: &[&str]) -> Result<Said> {
        let mut command = Command::new(binary()?);
        command.arg(name).arg("--bpffs").arg(self.directory.join("bpf/nodeguard"));
        output(command.arg("--admin-socket").arg(self.directory.join("admin.sock")).args(more))
    }

    /// Waits until a policy of a later epoch than this one is in force.
    pub fn in_force_after(&self, epoch: u32) -> Result<()> {
        until("the edit is in force", Duration::from_secs(5), || Ok(self.status()?.policy.epoch > epoch))
    }

    /// What it printed.
    pub fn printed(&self) -> String {
        self.process.printed()
    }

    /// `kill -9`.
    pub fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(Duration::from_secs(5)).map(drop)
    }
}

/// How many packets were counted with a reason.
pub fn packets(status: &Status, reason: &str) -> u64 {
    packets_of(status, None, reason)
}

/// How many packets were counted with a reason, for one rule or for all.
pub fn packets_of(status: &Status, rule: Option<&str>, reason: &str) -> u64 {
    let counters = status.counters.iter().filter(|counter| counter.reason == reason);
    counters.filter(|counter| rule.is_none_or(|rule| rule == counter.rule)).map(|counter| counter.packets).sum()
}

/// The first stream, or the first address that should have one.
pub fn stream(status: &Status) -> StreamState {
    status.tunnel.as_ref().and_then(|tunnel| tunnel.streams.first()).cloned().unwrap_or_default()
}

/// The guard's binary.
pub fn binary() -> Result<PathBuf> {
    built("nodeguard")
}
