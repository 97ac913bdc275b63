//! Owns the other ways to the node: the upstream agent behind a proxy-server of its own, and an API server that dials the node itself.
//! Called by `bench`.
//! Must never carry a request of one way by another: each way is an API server, with the same etcd behind it.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::process::Process;

use crate::{
    addresses::at,
    control::{Control, Egress, Front, STRATEGIES},
    install::Cluster,
    node::NAME,
    pki::{Pki, text},
    place::Where,
};

/// The port of the API server whose way is the upstream agent.
pub(super) const UPSTREAM: u16 = 6444;
/// That of the one that dials the node itself.
pub(super) const DIRECT: u16 = 6445;
/// Where the upstream agent's proxy-server takes it.
const AGENTS: u16 = 8232;

/// They run until this is dropped.
pub(super) struct Others {
    _agent: Process,
}

impl Others {
    /// Starts both.
    pub(super) fn start(cluster: &Cluster<'_>, control: &mut Control, pki: &Pki) -> Result<Others> {
        control.add(
            cluster.place,
            pki,
            &Front { port: UPSTREAM, agents: Some(AGENTS), egress: Egress::Grpc, strategies: STRATEGIES },
        )?;
        control.add(
            cluster.place,
            pki,
            &Front { port: DIRECT, agents: None, egress: Egress::Grpc, strategies: STRATEGIES },
        )?;
        // The one that dials itself has to be let out.
        cluster.place.let_out(10250)?;

        let token = cluster.place.directory.join("upstream-token");
        let create = ["-n", "kube-system", "create", "token", "nodeguard", "--audience=system:konnectivity-server"];
        fs::write(&token, cluster.kubectl.run(&create)?.trim())?;
        let target = lab::lab::target()?.with_file_name("upstream").join("proxy-agent");
        ensure!(target.is_file(), "{} is missing: `cargo xtask bench cluster` builds it", target.display());
        let mut agent = cluster.place.command(&target, Where::Node)?;
        agent.args([
            format!("--ca-cert={}", pki.text("ca.crt")?),
            format!("--proxy-server-host={}", at().control),
            format!("--proxy-server-port={AGENTS}"),
            format!("--service-account-token-path={}", text(&token)?),
            format!("--agent-identifiers=host={NAME}&{}={}", if at().whole == 32 { "ipv4" } else { "ipv6" }, at().node),
            "--admin-server-port=8233".to_owned(),
            "--health-server-port=8234".to_owned(),
            "--keepalive-time=60s".to_owned(),
        ]);
        let log = cluster.place.directory.join("proxy-agent.log");
        let mut agent = Process::start("proxy-agent", agent, &log)?;
        std::thread::sleep(Duration::from_secs(1));
        agent.check().context("the upstream agent")?;
        Ok(Others { _agent: agent })
    }
}
