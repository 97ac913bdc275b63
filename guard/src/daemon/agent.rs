//! Owns the agent without a kernel half: policy, tunnel, health port, drain.
//! Called by `main` for `agent`.
//! Must never load a kernel program, and never dial anything on its own word: a policy names it, or the operator said "anything".

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use guard_policy::{
    compile::compile,
    diagnostic::{Rejected, Source},
    node_facts::NodeFacts,
    policy_file::{Edit, LoadedPolicy, load},
};
use tokio::{net::TcpListener, sync::mpsc};

use crate::{
    cli::config::AgentConfig,
    daemon::{
        edit::{InForceAt, NothingInForce, take},
        parts::{Listeners, Parts, TunnelHalf},
        policy_watch as watch,
        state::{Current, connected, services_read},
    },
    dial::{connections::Connections, dialling::Dialling, serve::Dialer},
    kernel::pinholes::{PinholeError, Pinholes},
    report::{
        admin,
        admin::Served,
        assess::weaknesses,
        readiness::Readiness,
        status::{PolicyStatus, Status},
        weakness::WeaknessReason,
    },
    sys::lock::lock,
    tunnel::handle::Tunnel,
};

/// What `--dial-anything` means. A prefix never includes loopback nor the node's own addresses, so these are named; link-local addresses and
/// those of cloud metadata stay refused.
const ANYTHING: &str = "\
apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata: {name: dial-anything}
spec:
  mode: Enforce
  guard: []
  tunnel:
    dial:
      - node: {ports: [1-65535]}
      - pods: {cidrs: [0.0.0.0/0, '::/0', 127.0.0.1/32, '::1/128'], ports: [1-65535]}
      - services: {cidrs: [0.0.0.0/0, '::/0'], ports: [1-65535]}
";

/// The weakness that `--dial-anything` is.
const WEAK: &str =
    "--dial-anything: the control plane, and whoever takes it over, reaches everything that this node reaches";

/// No kernel half, so nothing to open.
struct NoKernel;

impl Pinholes for NoKernel {
    fn register(&self, _cookie: u64) -> Result<(), PinholeError> {
        Ok(())
    }
    fn forget(&self, _cookie: u64) {}
}

/// What a snapshot is taken of.
struct Agent {
    policy: Option<PathBuf>,
    current: Mutex<Current>,
    connections: Arc<Connections>,
    dialer: Arc<Dialer>,
    tunnel: Arc<Tunnel>,
}

impl Served for Agent {
    fn status(&self) -> Status {
        let current = lock(&self.current);
        let path = self.policy.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        let mut status = Status {
            daemon: true,
            mode: current.mode(),
            // Without a kernel half, no rule guards anything.
            policy: PolicyStatus { rules: Vec::new(), ..current.status(path, 0) },
            tunnel: Some(self.tunnel.state()),
            last_refused_dials: self.connections.last_refused(),
            dials: Some(self.connections.counts()),
            dialling: Dialling::of(&self.dialer),
            ..Status::default()
        };
        let no_kernel = "no kernel half (`nodeguard agent`): whoever reaches this node reaches its ports";
        let own = [
            Some(WeaknessReason::NoKernelHalf.says(no_kernel)),
            self.policy.is_none().then(|| WeaknessReason::DialAnything.says(WEAK)),
        ];
        status.weakened = own.into_iter().flatten().chain(weaknesses(&status)).collect();
        status
    }

    fn readiness(&self) -> Readiness {
        let checks = [connected(&self.tunnel)].into_iter().chain(services_read(&self.dialer.services)).collect();
        Readiness { checks, remarks: lock(&self.current).remark().into_iter().collect() }
    }
}

/// Runs until SIGTERM or SIGINT, then drains.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    let AgentConfig { policy, admin_socket, health, admin_port, half } = config;
    let node = half.node.clone();
    let first = match &policy {
        Some(path) => load(path, &node),
        None => anything(&node),
    };
    if let Err(rejected) = &first {
        return Err(NothingInForce(rejected.clone()).into());
    }
    if policy.is_none() {
        tracing::error!("{WEAK}; name its destinations in a policy and use --policy instead");
    }
    let listeners = Listeners::bind(admin_socket, health).await?;
    let half = TunnelHalf::new(half, Arc::new(NoKernel))?;
    let agent = Arc::new(Agent {
        policy: policy.clone(),
        current: Mutex::default(),
        connections: Arc::clone(&half.connections),
        tunnel: Arc::clone(&half.tunnel),
        dialer: Arc::clone(&half.dialer),
    });
    let taken = async |edit| {
        take(InForceAt { current: &agent.current, connections: &agent.connections, kernel: None }, edit).await
    };
    taken(first.clone()).await?;

    let mut parts = Parts::start(&half, listeners, &agent);
    let (edits_to, edits) = mpsc::channel(1);
    if let Some(path) = policy {
        parts.spawn("policy watch", watch::watch(path, node, first, edits_to));
    }
    if let (Some(address), Some(health)) = (admin_port, health) {
        // As upstream does: the agent works without this port.
        match TcpListener::bind(address).await {
            Ok(listener) => {
                let stopped = parts.stopped();
                parts.spawn_fallible("admin port", admin::serve_redirect(listener, health.port(), stopped));
            }
            Err(error) => tracing::warn!(
                %address,
                %error,
                "cannot listen (--admin-server-port): only the health port serves /metrics"
            ),
        }
    }
    let clean = parts.run(&half, edits, taken).await?;
    tracing::info!(clean, "ended");
    Ok(())
}

/// The policy of `--dial-anything`.
fn anything(node: &NodeFacts) -> Edit {
    let source = Source { path: "--dial-anything".into(), text: ANYTHING.to_owned() };
    match compile(&source, node) {
        Ok((ruleset, warnings)) => Ok(LoadedPolicy { source, ruleset: Arc::new(ruleset), warnings }),
        Err(diagnostics) => Err(Rejected { source, diagnostics }),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use guard_policy::{authorize::authorize, refusal::Refusal};

    use super::*;
    use crate::cli::{
        args::{Cli, Command},
        config::resolve_agent,
    };

    #[test]
    fn anything_is_anything_but_what_serves_credentials() {
        // In a pod, where wide prefixes do not hold Services.
        let node = NodeFacts {
            addresses: vec![[10, 0, 0, 7].into()],
            service_host: Some([10, 96, 0, 1].into()),
            ..NodeFacts::default()
        };
        let ruleset = anything(&node).unwrap().ruleset;
        let judge = |address: &str| authorize(Some(&ruleset), &node, address.parse().unwrap()).map(drop);
        for address in [
            "10.0.0.7:22",
            "10.1.2.3:1",
            "10.96.3.4:443",
            "[::]:80",
            "127.0.0.1:80",
            "[::1]:65535",
            "[2001:db8::1]:443",
        ] {
            assert_eq!(judge(address), Ok(()), "{address}");
        }
        assert_eq!(judge("169.254.169.254:80"), Err(Refusal::LinkLocal));
        assert_eq!(judge("[fd00:ec2::254]:80"), Err(Refusal::CloudMetadata));
        assert_eq!(judge("[64:ff9b::169.254.169.254]:80"), Err(Refusal::LinkLocal));
        assert_eq!(judge("224.0.0.1:80"), Err(Refusal::Multicast));
    }

    #[tokio::test]
    async fn a_status_can_be_taken_of_an_agent_that_is_not_connected() {
        let words = ["nodeguard", "agent", "--ca-cert=ca.crt", "--dial-anything"];
        let Command::Agent(args) = Cli::try_parse_from(words).unwrap().command else { panic!("not agent") };
        let half = TunnelHalf::new(resolve_agent(*args).unwrap().half, Arc::new(NoKernel)).unwrap();
        let agent = Agent {
            policy: None,
            current: Mutex::default(),
            connections: Arc::clone(&half.connections),
            tunnel: Arc::clone(&half.tunnel),
            dialer: Arc::clone(&half.dialer),
        };
        // In a thread of its own: a lock that is taken twice would never come back.
        let (taken, status) = std::sync::mpsc::channel();
        std::thread::spawn(move || drop(taken.send((agent.status(), agent.readiness()))));
        let (status, _) = status.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        assert!(status.tunnel.unwrap().streams.is_empty());
        assert!(!status.weakened.is_empty());
    }
}
