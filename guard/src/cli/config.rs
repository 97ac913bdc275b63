//! Owns the step from the command line to a complete configuration.
//! Called by `main` for `run` and `agent`.
//! Must never default to weaker protection: a missing CA is an error and does not mean "any server".

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use guard_policy::node_facts::NodeFacts;

use crate::{
    cli::{
        args::{AgentArgs, AuditArgs, RunArgs, TunnelHalfArgs},
        upstream_flags::UpstreamArgs,
    },
    cluster::{api_server, leases::LeaseConfig, services::known::Services},
    dial::{audit::file::FileConfig, limits::Limits},
    kernel::{
        cgroups::{root, root::CgroupError},
        pins::Location,
    },
    net::{
        host_port::{HostPort, HostPortError},
        http_proxy::{ProxyEnvironment, ProxyError},
        remote_host::RemoteHost,
        tls::{CredentialFiles, TlsOptions},
        verify::CertificateConstraints,
    },
    sys::read_node_facts,
    tunnel::{
        identifiers::{Identifier, IdentifierError, Identifiers},
        servers::Pace,
        settings::{CountSource, TunnelConfig},
    },
};

/// How often the server leases are counted, as a multiple of --sync-interval-cap: every 30 seconds by default.
const LEASES_EVERY: u32 = 3;
/// The default port of an HTTP proxy for the tunnel, as in grpc-go.
const PROXY_PORT: u16 = 443;

/// The configuration of `run`.
pub struct Config {
    /// The policy file.
    pub policy: PathBuf,
    /// Where the kernel half is attached and pinned.
    pub location: Location,
    /// Whether the whole node is meant, because no cgroup was named.
    pub whole_node: bool,
    /// Whether the kernel measures the run time of its programs.
    pub program_stats: bool,
    /// The admin socket, which `nodeguard status` asks.
    pub admin_socket: PathBuf,
    /// The health port.
    pub health: Option<SocketAddr>,
    /// The tunnel half.
    pub half: TunnelHalfConfig,
}

/// What the tunnel half of both daemons needs.
pub struct TunnelHalfConfig {
    /// How long open dials may continue after SIGTERM.
    pub drain_timeout: Duration,
    /// The node's addresses and names.
    pub node: NodeFacts,
    /// The tunnel.
    pub tunnel: TunnelConfig,
    /// Whether the addresses of this node's pods are advertised.
    pub advertise_pods: bool,
    /// The audit file.
    pub audit: Option<FileConfig>,
    /// The limits for the control plane.
    pub limits: Limits,
    /// The cluster's Services, if they are watched.
    pub services: Services,
}

/// Why the command line does not give a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No CA certificates.
    #[error("--ca-cert is required: the proxy-server's certificate is verified against these CA certificates only")]
    NoCa,
    /// A certificate without a key, or a key without a certificate.
    #[error("--agent-cert and --agent-key must be given together")]
    HalfAnIdentity,
    /// Not an address.
    #[error("{0}: `{1}` is not an IP address")]
    Listen(&'static str, String),
    /// The pause between attempts is longer than its limit.
    #[error("--sync-interval ({0:?}) is longer than --sync-interval-cap ({1:?})")]
    Interval(Duration, Duration),
    /// The identifiers are invalid.
    #[error(transparent)]
    Identifiers(#[from] IdentifierError),
    /// Not the address of a proxy-server.
    #[error("--proxy-server-host")]
    Host(#[source] HostPortError),
    /// The environment does not name a valid HTTP proxy.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// There is no cgroup to attach to.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The interfaces could not be listed.
    #[error("cannot read the node's addresses")]
    Node(#[source] std::io::Error),
}

/// The configuration of `agent`.
pub struct AgentConfig {
    /// The policy file; `None` means --dial-anything.
    pub policy: Option<PathBuf>,
    /// The admin socket, which `nodeguard status` asks.
    pub admin_socket: Option<PathBuf>,
    /// The health port.
    pub health: Option<SocketAddr>,
    /// The admin port of upstream, which redirects /metrics to the health port.
    pub admin_port: Option<SocketAddr>,
    /// The tunnel half.
    pub half: TunnelHalfConfig,
}

/// Resolves the arguments of `run`. What they leave open is read from the machine.
pub fn resolve(args: RunArgs) -> Result<Config, ConfigError> {
    let (health, half) = resolve_half(args.half)?;
    let whole_node = args.cgroup.is_none();
    let cgroup = match args.cgroup {
        Some(cgroup) => cgroup,
        None => root::v2_root()?,
    };
    Ok(Config {
        policy: args.policy,
        location: Location { cgroup, bpffs: args.bpffs },
        whole_node,
        program_stats: args.program_stats,
        admin_socket: args.admin_socket,
        health,
        half,
    })
}

/// Resolves the arguments of `agent`, which has no kernel half.
pub fn resolve_agent(args: AgentArgs) -> Result<AgentConfig, ConfigError> {
    let (host, port) = (args.half.agent.admin_bind_address.clone(), args.half.agent.admin_server_port);
    let (health, half) = resolve_half(args.half)?;
    Ok(AgentConfig {
        policy: args.policy,
        admin_socket: args.admin_socket,
        admin_port: health.and(listen("--admin-bind-address", &host, port)?),
        health,
        half,
    })
}

/// Resolves the flags of both daemons to the health port and the tunnel half.
fn resolve_half(args: TunnelHalfArgs) -> Result<(Option<SocketAddr>, TunnelHalfConfig), ConfigError> {
    let kubeconfig = args.agent.kubeconfig.clone();
    let (health, node, tunnel) = resolve_tunnel(args.agent, args.node_name)?;
    let services = services(args.watch_services, kubeconfig, &node)?;
    let half = TunnelHalfConfig {
        drain_timeout: args.drain_timeout,
        node,
        tunnel,
        advertise_pods: args.advertise_pod_addresses,
        audit: audit_file(args.audit),
        limits: args.limits.into(),
        services,
    };
    Ok((health, half))
}

/// Resolves the upstream flags to the health port, the node's facts and the tunnel.
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
    let mut identifiers = Identifiers::parse(&agent.agent_identifiers.clone().unwrap_or_default())?;
    let mut names: Vec<String> = identifiers.hosts().map(str::to_owned).collect();
    names.extend(node_name.clone());
    let node = read_node_facts::read(&names).map_err(ConfigError::Node)?;
    if identifiers.is_empty() {
        identifiers = of_node(&node, node_name);
    }
    let environment = environment(PROXY_PORT)?;
    let mut hosts = Vec::new();
    for text in agent.proxy_server_host.iter().map(|text| text.trim()) {
        let at = HostPort::parse(text, agent.proxy_server_port).map_err(ConfigError::Host)?;
        let host = RemoteHost { http_proxy: environment.proxy_for(&at).map(Arc::new), at };
        if let Some(proxy) = &host.http_proxy {
            tracing::info!(server = %host, %proxy, "the tunnel goes through the HTTP proxy of HTTPS_PROXY; NO_PROXY can exclude this server");
        }
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    let health = listen("--health-server-host", &agent.health_server_host, agent.health_server_port)?;
    let alpn = agent.alpn();
    let leases = LeaseConfig {
        kubeconfig: given(agent.kubeconfig),
        environment: self::environment(api_server::PROXY_PORT)?,
        namespace: agent.lease_namespace,
        label: agent.lease_label,
        every: agent.sync_interval_cap * LEASES_EVERY,
    };
    let count = match (agent.count_server_leases, agent.server_count_source.as_str()) {
        (false, _) => CountSource::Responses,
        (true, "max") => CountSource::Larger(leases),
        (true, _) => CountSource::Leases(leases),
    };
    let tunnel = TunnelConfig {
        hosts,
        files: CredentialFiles {
            ca,
            identity,
            token: given(agent.service_account_token_path),
            crl: agent.trust.crl_file.and_then(given),
        },
        tls: TlsOptions {
            constraints: CertificateConstraints { pins: agent.trust.server_spki_pin, names: agent.trust.server_san },
            only_tls13: agent.trust.tls_min_version.ends_with('3'),
            alpn,
        },
        agent_id: agent
            .agent_id
            .filter(|id| !id.is_empty())
            .unwrap_or_else(|| format!("{:032x}", rand::random::<u128>())),
        identifiers,
        pace: Pace { interval: agent.sync_interval, cap: agent.sync_interval_cap, forever: agent.sync_forever },
        keepalive: agent.keepalive_time,
        max_age: agent.trust.max_stream_age.filter(|age| !age.is_zero()),
        count,
    };
    Ok((health, node, tunnel))
}

fn services(watched: bool, kubeconfig: PathBuf, node: &NodeFacts) -> Result<Services, ConfigError> {
    if !watched {
        return Ok(Services::unwatched());
    }
    Ok(Services::watched(given(kubeconfig), environment(api_server::PROXY_PORT)?, node.names.clone()))
}

/// The HTTP proxies of this process's environment. `port` is the default port of a proxy.
fn environment(port: u16) -> Result<ProxyEnvironment, ProxyError> {
    ProxyEnvironment::read(|name| std::env::var(name).ok(), port)
}

fn audit_file(args: AuditArgs) -> Option<FileConfig> {
    let AuditArgs { audit_file, audit_file_max_size: max_size, audit_file_max_backups: max_backups } = args;
    audit_file.and_then(given).map(|path| FileConfig { path, max_size, max_backups })
}

/// The address to listen on: all addresses if the host is empty, none if the port is 0.
fn listen(flag: &'static str, host: &str, port: u16) -> Result<Option<SocketAddr>, ConfigError> {
    let host = match host {
        "" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        host => host.parse().map_err(|_| ConfigError::Listen(flag, host.to_owned()))?,
    };
    Ok((port != 0).then(|| SocketAddr::new(host, port)))
}

/// The path, or `None` if it is empty.
fn given(path: PathBuf) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then_some(path)
}

/// The identifiers of this node, if the command line gives none.
fn of_node(node: &NodeFacts, name: Option<String>) -> Identifiers {
    let mut identifiers = Identifiers::default();
    node.addresses.iter().for_each(|address| identifiers.add_address(*address));
    // The cluster may spell the name with capitals, so that spelling is advertised too.
    name.into_iter().chain(node.names.iter().cloned()).for_each(|name| identifiers.add(Identifier::Host(name)));
    identifiers
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::{Cli, Command};

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
        assert!(given.half.node.names.contains(&"node-1".to_owned()));
        let canonical = "ipv4=10.0.0.1&host=Node-1&host=node-1&default-route=true";
        assert_eq!(given.half.tunnel.identifiers.to_string(), canonical);
        assert!(matches!(config("ip=10.0.0.1"), Err(ConfigError::Identifiers(error)) if error.pair == "ip=10.0.0.1"));
        let node = NodeFacts {
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            names: vec!["n".into()],
            ..NodeFacts::default()
        };
        assert_eq!(of_node(&node, Some("N".into())).to_string(), "ipv4=10.0.0.1&ipv6=fd00::1&host=N&host=n");
    }

    #[test]
    fn servers_are_a_list_with_or_without_ports() {
        let hosts = |more: &[&str]| {
            let all: Vec<&str> = ["--ca-cert", "ca.crt"].iter().chain(more).copied().collect();
            config(&all).map(|config| config.half.tunnel.hosts.iter().map(RemoteHost::to_string).collect::<Vec<_>>())
        };
        assert_eq!(hosts(&[]).unwrap(), ["127.0.0.1:8091"]);
        let more = [
            "--proxy-server-host=a.example:1,[fd00::1]:2",
            "--proxy-server-host=10.0.0.1",
            "--proxy-server-host=10.0.0.1:8132",
            "--proxy-server-port=8132",
        ];
        assert_eq!(hosts(&more).unwrap(), ["a.example:1", "[fd00::1]:2", "10.0.0.1:8132"]);
        assert!(matches!(hosts(&["--proxy-server-host=a b"]), Err(ConfigError::Host(_))));
    }
}
