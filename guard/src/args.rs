//! Owns the command line, typed and unresolved.
//! Called by `main`.
//! Must never read the environment or the machine beyond what clap does: `config` resolves.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Keeps a Kubernetes node closed to everyone but the control plane that comes through its Konnectivity tunnel, and the peers that
/// a policy names.
#[derive(Debug, Parser)]
#[command(name = "nodeguard", version, max_term_width = 120)]
#[command(
    after_help = "Exit codes: 0 done, 1 it found something wrong or failed, 2 wrong usage, 3 no daemon could be reached."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Guards this node: brings the policy into the kernel, holds the tunnel, admits what comes through it.
    Run(Box<RunArgs>),
    /// Checks a policy file without applying it.
    Check {
        /// The policy file.
        file: PathBuf,
        /// How to print the findings.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Shows what the guard does on this node: mode, policy, programs, tunnel, counters, last denials.
    Status {
        /// Where the daemon listens.
        #[arg(long, default_value = ADMIN_SOCKET)]
        admin_socket: PathBuf,
        /// Where the kernel half is pinned: read if no daemon answers.
        #[arg(long, default_value = BPFFS)]
        bpffs: PathBuf,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Removes the guard from the kernel and says what is open then. Enforcement outlives the daemon; only this ends it.
    Unpin {
        /// Where the daemon listens: while it runs, it would put everything back.
        #[arg(long, default_value = ADMIN_SOCKET)]
        admin_socket: PathBuf,
        /// Where the kernel half is pinned.
        #[arg(long, default_value = BPFFS)]
        bpffs: PathBuf,
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
}

/// Where the daemon listens for `status` by default.
pub const ADMIN_SOCKET: &str = "/run/nodeguard/admin.sock";
/// Where the kernel half is pinned by default.
pub const BPFFS: &str = "/sys/fs/bpf/nodeguard";

/// How a command prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs; the shape is stable.
    Json,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// `nodeguard run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// The policy file; edits come into force by themselves.
    #[arg(long)]
    pub policy: PathBuf,
    /// The cgroup v2 directory whose sockets are guarded [default: the root of the hierarchy, that is the whole node].
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// The directory on a bpf file system to pin the kernel half in.
    #[arg(long, default_value = BPFFS)]
    pub bpffs: PathBuf,
    /// Where `nodeguard status` asks.
    #[arg(long, default_value = ADMIN_SOCKET)]
    pub admin_socket: PathBuf,
    /// The node's name in the cluster: a dial to it is a dial to the node's address.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// How long open dials may go on after SIGTERM.
    #[arg(long, value_parser = duration, default_value = "25s")]
    pub drain_timeout: Duration,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// The flags of the upstream konnectivity-agent.
    #[command(flatten)]
    pub agent: AgentArgs,
}

/// The flags of the upstream konnectivity-agent (v0.36.0), with its defaults.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Tunnel (the flags of konnectivity-agent)")]
pub struct AgentArgs {
    /// The host of the proxy-server; its certificate must be for this name or address.
    #[arg(long, default_value = "127.0.0.1")]
    pub proxy_server_host: String,
    /// The agent port of the proxy-server.
    #[arg(long, default_value_t = 8091)]
    pub proxy_server_port: u16,
    /// The CA certificates (PEM) that the proxy-server's certificate must come from. There is no other trust.
    #[arg(long)]
    pub ca_cert: Option<PathBuf>,
    /// The client certificate chain (PEM); needs --agent-key.
    #[arg(long, requires = "agent_key")]
    pub agent_cert: Option<PathBuf>,
    /// The client certificate's key (PEM); needs --agent-cert.
    #[arg(long, requires = "agent_cert")]
    pub agent_key: Option<PathBuf>,
    /// Protocols to offer in the TLS handshake before h2.
    #[arg(long, value_delimiter = ',')]
    pub alpn_proto: Vec<String>,
    /// A service-account token to send, read anew for each connection.
    #[arg(long)]
    pub service_account_token_path: Option<PathBuf>,
    /// The id of this agent [default: random]. Each stream adds a part of its own.
    #[arg(long, env = "PROXY_AGENT_ID")]
    pub agent_id: Option<String>,
    /// What the control plane may dial this agent by, as in `ipv4=10.0.0.1&host=node1` [default: the node's addresses and names].
    #[arg(long)]
    pub agent_identifiers: Option<String>,
    /// The first wait before a new connection attempt; it grows by half each time.
    #[arg(long, value_parser = duration, default_value = "1s")]
    pub sync_interval: Duration,
    /// The longest wait before a new connection attempt.
    #[arg(long, value_parser = duration, default_value = "10s")]
    pub sync_interval_cap: Duration,
    /// How often the tunnel is probed when it is idle; at least 30s, or the server ends it.
    #[arg(long, value_parser = duration, default_value = "1h")]
    pub keepalive_time: Duration,
    /// The address of the health port [default: all].
    #[arg(long)]
    pub health_server_host: Option<IpAddr>,
    /// The health port: /healthz, /readyz, /metrics. 0 serves none.
    #[arg(long, default_value_t = 8093)]
    pub health_server_port: u16,
}

/// A duration as Go writes it: `1h0m0s`, `100ms`, `1.5s`.
fn duration(text: &str) -> Result<Duration, String> {
    let failed = || format!("`{text}` is no duration; write it as in `1s`, `100ms` or `1h30m`");
    let (mut rest, mut total) = (text, 0f64);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(failed)?;
        let number: f64 = rest.get(..digits).and_then(|number| number.parse().ok()).ok_or_else(failed)?;
        let after = rest.get(digits..).unwrap_or_default();
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(failed()),
        };
        total += number * seconds;
        rest = next;
    }
    if text.is_empty() { Err(failed()) } else { Duration::try_from_secs_f64(total).map_err(|_| failed()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_gos() {
        let all = [("1h0m0s", 3600.0), ("100ms", 0.1), ("1.5s", 1.5), ("1h30m", 5400.0), ("0", 0.0), ("10s", 10.0)];
        for (text, seconds) in all {
            assert_eq!(duration(text), Ok(Duration::from_secs_f64(seconds)), "{text}");
        }
        for text in ["", "1", "s", "1x", "-1s", "1s1"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
