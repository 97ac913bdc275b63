//! Owns the step from the command line to a configuration with nothing left optional.
//! Called by `main` for `run` and `agent`.
//! Must never fill in what weakens protection: a missing CA is an error, not "any server".

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::{
    args::{AgentArgs, AuditArgs, RunArgs},
    audit::file::FileConfig,
    flags::UpstreamArgs,
    kernel::{
        cgroup::{self, CgroupError},
        load::Location,
    },
    node::NodeFacts,
    tunnel::TunnelConfig,
};

/// What `run` needs.
#[derive(Clone, Debug)]
pub struct Config {
    /// The policy file.
    pub policy: PathBuf,
    /// Where the kernel half lives.
    pub location: Location,
    /// Where `status` asks.
    pub admin_socket: PathBuf,
    /// The health port.
    pub health: Option<SocketAddr>,
    /// How long open dials may go on after SIGTERM.
    pub drain_timeout: Duration,
    /// What the node knows of itself.
    pub node: NodeFacts,
    /// The tunnel.
    pub tunnel: TunnelConfig,
    /// The audit file.
    pub audit: Option<FileConfig>,
}

/// Why the command line makes no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No trust.
    #[error("--ca-cert is needed: the proxy-server's certificate is checked against it and nothing else")]
    NoCa,
    /// A certificate without its key, or the other way round.
    #[error("--agent-cert and --agent-key are needed together")]
    HalfAnIdentity,
    /// Not an address.
    #[error("--health-server-host: `{0}` is no IP address")]
    HealthHost(String),
    /// The waits are the wrong way round.
    #[error("--sync-interval ({0:?}) is longer than --sync-interval-cap ({1:?})")]
    Interval(Duration, Duration),
    /// No identifiers.
    #[error(
        "--agent-identifiers: `{0}` is not known; it is a URL query of ipv4, ipv6, host, cidr and default-route, as in `ipv4=10.0.0.1&host=node1`"
    )]
    Identifiers(String),
    /// No cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// No interfaces.
    #[error("cannot read the node's addresses")]
    Node(#[source] std::io::Error),
}

/// What `agent` needs.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// The policy file; `None` dials anything.
    pub policy: Option<PathBuf>,
    /// Where `status` asks.
    pub admin_socket: Option<PathBuf>,
    /// The health port.
    pub health: Option<SocketAddr>,
    /// How long open dials may go on after SIGTERM.
    pub drain_timeout: Duration,
    /// What the node knows of itself.
    pub node: NodeFacts,
    /// The tunnel.
    pub tunnel: TunnelConfig,
    /// The audit file.
    pub audit: Option<FileConfig>,
}

/// Resolves the arguments of `run`, reading what is left open from the machine.
pub fn resolve(args: RunArgs) -> Result<Config, ConfigError> {
    let (health, node, tunnel) = resolve_tunnel(args.agent, args.node_name)?;
    let cgroup = match args.cgroup {
        Some(cgroup) => cgroup,
        None => cgroup::v2_root()?,
    };
    Ok(Config {
        policy: args.policy,
        location: Location { cgroup, bpffs: args.bpffs },
        admin_socket: args.admin_socket,
        health,
        drain_timeout: args.drain_timeout,
        node,
        tunnel,
        audit: audit_file(args.audit),
    })
}

/// Resolves the arguments of `agent`, which has no kernel half.
pub fn resolve_agent(args: AgentArgs) -> Result<AgentConfig, ConfigError> {
    let (health, node, tunnel) = resolve_tunnel(args.agent, args.node_name)?;
    Ok(AgentConfig {
        policy: args.policy,
        admin_socket: args.admin_socket,
        health,
        drain_timeout: args.drain_timeout,
        node,
        tunnel,
        audit: audit_file(args.audit),
    })
}

/// The upstream flags: the health port, the node's facts, the tunnel.
fn resolve_tunnel(
    agent: UpstreamArgs,
    node_name: Option<String>,
) -> Result<(Option<SocketAddr>, NodeFacts, TunnelConfig), ConfigError> {
    let ca = given(agent.ca_cert.clone()).ok_or(ConfigError::NoCa)?;
    if agent.sync_interval > agent.sync_interval_cap {
        return Err(ConfigError::Interval(agent.sync_interval, agent.sync_interval_cap));
    }
    let identity = match (given(agent.agent_cert.clone()), given(agent.agent_key.clone())) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => return Err(ConfigError::HalfAnIdentity),
    };
    let without_effect = agent.without_effect();
    if !without_effect.is_empty() {
        tracing::info!(flags = without_effect.join(", "), "flags of the upstream agent that have no effect here");
    }
    let identifiers_given = agent.agent_identifiers.clone().unwrap_or_default();
    let mut names = host_names(&identifiers_given)?;
    names.extend(node_name);
    let node = NodeFacts::read(&names).map_err(ConfigError::Node)?;
    let host = match agent.health_server_host.as_str() {
        "" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        host => host.parse().map_err(|_| ConfigError::HealthHost(host.to_owned()))?,
    };
    let health = (agent.health_server_port != 0).then(|| SocketAddr::new(host, agent.health_server_port));
    let tunnel = TunnelConfig {
        alpn: agent.alpn(),
        host: agent.proxy_server_host,
        port: agent.proxy_server_port,
        ca,
        identity,
        token: given(agent.service_account_token_path),
        agent_id: agent
            .agent_id
            .filter(|id| !id.is_empty())
            .unwrap_or_else(|| format!("{:032x}", rand::random::<u128>())),
        identifiers: if identifiers_given.is_empty() { identifiers(&node) } else { identifiers_given },
        backoff: (agent.sync_interval, agent.sync_interval_cap),
        keepalive: agent.keepalive_time,
    };
    Ok((health, node, tunnel))
}

fn audit_file(args: AuditArgs) -> Option<FileConfig> {
    let AuditArgs { audit_file, audit_file_max_size: max_size, audit_file_max_backups: max_backups } = args;
    audit_file.and_then(given).map(|path| FileConfig { path, max_size, max_backups })
}

/// A path that is not empty.
fn given(path: PathBuf) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then_some(path)
}

/// The host names among identifiers, which are checked for keys that the server would silently ignore.
fn host_names(identifiers: &str) -> Result<Vec<String>, ConfigError> {
    let mut names = Vec::new();
    for pair in identifiers.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("host", name)) => names.push(name.to_owned()),
            Some(("ipv4" | "ipv6" | "cidr" | "default-route", _)) => {}
            Some(_) | None => return Err(ConfigError::Identifiers(pair.to_owned())),
        }
    }
    Ok(names)
}

/// What the control plane may dial this node by. IPv6 is in the form of RFC 5952: the server compares strings.
fn identifiers(node: &NodeFacts) -> String {
    let addresses = node.addresses.iter().map(|address| match address {
        IpAddr::V4(address) => format!("ipv4={address}"),
        IpAddr::V6(address) => format!("ipv6={address}"),
    });
    addresses.chain(node.names.iter().map(|name| format!("host={name}"))).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn config(more: &[&str]) -> Result<Config, ConfigError> {
        let all = ["nodeguard", "run", "--policy", "p.yaml", "--cgroup", "/c"].iter().chain(more);
        let Command::Run(args) = Cli::try_parse_from(all).unwrap().command else { panic!("not run") };
        resolve(*args)
    }

    #[test]
    fn a_missing_ca_is_an_error_and_never_any_server() {
        assert!(matches!(config(&[]), Err(ConfigError::NoCa)));
        assert!(matches!(config(&["--ca-cert="]), Err(ConfigError::NoCa)));
        assert!(config(&["--ca-cert", "ca.crt"]).is_ok());
        assert!(matches!(config(&["--ca-cert", "ca.crt", "--agent-key=k"]), Err(ConfigError::HalfAnIdentity)));
    }

    #[test]
    fn identifiers_name_the_node_and_unknown_ones_are_refused() {
        let config = |identifiers: &str| config(&["--ca-cert", "ca.crt", "--agent-identifiers", identifiers]);
        let given = config("ipv4=10.0.0.1&host=Node-1&default-route=true").unwrap();
        assert!(given.node.names.contains(&"node-1".to_owned()));
        assert_eq!(given.tunnel.identifiers, "ipv4=10.0.0.1&host=Node-1&default-route=true");
        assert!(matches!(config("ip=10.0.0.1"), Err(ConfigError::Identifiers(pair)) if pair == "ip=10.0.0.1"));
        let node = NodeFacts {
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            names: vec!["n".into()],
        };
        assert_eq!(identifiers(&node), "ipv4=10.0.0.1&ipv6=fd00::1&host=n");
    }
}
