//! Owns the guard of a lab: the real binary, with the options that keep it inside the lab.
//! Called by `lab`, and by tests that kill it, edit its policy or read its status.
//! Must never attach outside the lab's own cgroup.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nodeguard::status::Status;

use crate::{
    certs::Certs,
    lab::target,
    net::{Net, Who},
    process::{Process, command, output, until},
    rights::Rights,
};

/// A running guard.
pub struct Daemon {
    process: Process,
    socket: PathBuf,
    bpffs: PathBuf,
}

/// Where a guard works.
pub struct Place<'a> {
    /// The namespaces.
    pub net: &'a Net,
    /// The certificates.
    pub certs: &'a Certs,
    /// The cgroup that it runs in and attaches to.
    pub cgroup: &'a Path,
    /// The lab's directory: policy, socket, log, bpffs.
    pub directory: &'a Path,
    /// Which build of it.
    pub build: Build,
    /// Where it looks for the proxy-server.
    pub agent_port: u16,
    /// What it may do.
    pub rights: Rights,
    /// More of its options.
    pub options: &'a [&'static str],
    /// More of its environment.
    pub variables: &'a [(&'static str, &'static str)],
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
        match self {
            Build::Own => Build::OtherAbi,
            Build::OtherAbi => Build::Own,
        }
    }

    fn binary(self) -> Result<PathBuf> {
        match self {
            Build::Own => binary(),
            Build::OtherAbi => {
                let binary = target()?.join("nodeguard-other-abi");
                ensure!(binary.is_file(), "{} is missing: `cargo xtask test` builds it", binary.display());
                Ok(binary)
            }
        }
    }
}

impl Daemon {
    /// The command that starts one.
    pub fn command(place: &Place<'_>) -> Result<Command> {
        let mut run = command(&place.build.binary()?, place.net.open(Who::Node)?, place.cgroup)?;
        let at = |name: &str| place.directory.join(name).display().to_string();
        let certs = |name: &str| place.certs.path(name).display().to_string();
        run.args([
            "run",
            "--policy",
            &at("policy/policy.yaml"),
            "--cgroup",
            &place.cgroup.display().to_string(),
            "--bpffs",
            &at("bpf/nodeguard"),
        ]);
        run.args([
            "--admin-socket",
            &at("admin.sock"),
            "--node-name",
            "node",
            "--health-server-host",
            "127.0.0.1",
            "--drain-timeout",
            "3s",
        ]);
        run.args([
            "--proxy-server-host",
            &Who::ControlPlane.v4().to_string(),
            "--proxy-server-port",
            &place.agent_port.to_string(),
        ]);
        run.args([
            "--ca-cert",
            &certs("ca.crt"),
            "--agent-cert",
            &certs("agent.crt"),
            "--agent-key",
            &certs("agent.key"),
        ]);
        run.args(["--sync-interval", "100ms", "--sync-interval-cap", "500ms"])
            .env("RUST_BACKTRACE", "1")
            .env_remove("RUST_LOG")
            .envs(place.variables.iter().copied());
        run.args(place.options);
        place.rights.own(place.directory)?;
        place.rights.give(&mut run);
        Ok(run)
    }

    /// Starts one and waits until its policy is in force.
    pub fn start(place: &Place<'_>) -> Result<Daemon> {
        let process = Process::start("nodeguard", Daemon::command(place)?, &place.directory.join("nodeguard.log"))?;
        let mut daemon = Daemon {
            process,
            socket: place.directory.join("admin.sock"),
            bpffs: place.directory.join("bpf/nodeguard"),
        };
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
            Ok(stream(&self.status()?, "state") == "connected")
        })
        .with_context(|| self.process.printed())
    }

    /// What `nodeguard status -o json` says.
    pub fn status(&self) -> Result<Status> {
        let said = output(self.command_of("status", &["-o", "json"])?)?;
        ensure!(said.status.success(), "nodeguard status: {}", String::from_utf8_lossy(&said.stderr));
        Ok(serde_json::from_slice(&said.stdout)?)
    }

    /// What `nodeguard status` prints.
    pub fn status_text(&self) -> Result<String> {
        Ok(String::from_utf8(output(self.command_of("status", &[])?)?.stdout)?)
    }

    /// A command line about this guard.
    pub fn command_of(&self, name: &str, more: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.arg(name).arg("--bpffs").arg(&self.bpffs).arg("--admin-socket").arg(&self.socket).args(more);
        Ok(command)
    }

    /// What it printed.
    pub fn printed(&self) -> String {
        self.process.printed()
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// `kill -9`.
    pub fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(Duration::from_secs(5)).map(drop)
    }
}

/// A field of the first stream.
pub fn stream(status: &Status, field: &str) -> String {
    let stream = status.tunnel.get("streams").and_then(|streams| streams.get(0));
    stream.and_then(|stream| stream.get(field)).and_then(|value| value.as_str()).unwrap_or_default().to_owned()
}

/// The guard's binary.
pub fn binary() -> Result<PathBuf> {
    let binary = target()?.join("nodeguard");
    ensure!(binary.is_file(), "{} is missing: `cargo build -p nodeguard`", binary.display());
    Ok(binary)
}
