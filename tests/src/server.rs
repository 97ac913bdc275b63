//! Owns the real proxy-server of a lab.
//! Called by `lab`, and by tests that stop it or give it another certificate.
//! Must never be a stand-in: the binary is the upstream project's, at v0.36.0.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;

use crate::{
    certs::{Certs, ServerCert},
    lab::target,
    net::{Net, Who},
    process::{Process, command, until},
};

/// The port for agents.
pub const AGENT_PORT: u16 = 8091;

/// A running proxy-server.
pub struct ProxyServer {
    process: Process,
    /// Where the API server would connect: HTTP CONNECT over a Unix socket.
    pub socket: PathBuf,
}

impl ProxyServer {
    /// Starts one and waits until it listens.
    pub fn start(net: &Net, certs: &Certs, cert: ServerCert, cgroup: &Path, directory: &Path) -> Result<ProxyServer> {
        certs.server(cert)?;
        let binary = target()?.with_file_name("upstream").join("proxy-server");
        anyhow::ensure!(binary.is_file(), "{} is missing: run `cargo xtask setup`", binary.display());
        let socket = directory.join("konnectivity.sock");
        let mut server = command(&binary, net.open(Who::ControlPlane)?, cgroup)?;
        let address = Who::ControlPlane.v4().to_string();
        server.args([
            "--mode=http-connect",
            "--server-port=0",
            "--proxy-strategies=destHost,default",
            "--server-id=lab",
            "--server-count=1",
        ]);
        server.args([
            format!("--uds-name={}", socket.display()),
            format!("--agent-bind-address={address}"),
            format!("--agent-port={AGENT_PORT}"),
        ]);
        server.args([
            "--health-bind-address=127.0.0.1",
            "--health-port=8092",
            "--admin-bind-address=127.0.0.1",
            "--admin-port=8095",
        ]);
        for (flag, file) in
            [("cluster-cert", "server.crt"), ("cluster-key", "server.key"), ("cluster-ca-cert", "ca.crt")]
        {
            server.arg(format!("--{flag}={}", certs.path(file).display()));
        }
        let mut process = Process::start("proxy-server", server, &directory.join("proxy-server.log"))?;
        until("the proxy-server listens", Duration::from_secs(20), || {
            process.check()?;
            Ok(UnixStream::connect(&socket).is_ok())
        })?;
        Ok(ProxyServer { process, socket })
    }

    /// What it printed.
    pub fn printed(&self) -> String {
        self.process.printed()
    }
}
