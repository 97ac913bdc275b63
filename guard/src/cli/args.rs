//! Owns the command line, typed and unresolved.
//! Called by `main`.
//! Must never read the environment or the machine beyond what clap does: `config` resolves.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    cli::{limit_args::LimitArgs, upstream_flags::UpstreamArgs},
    sys::units::{duration, file_size},
};

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
    /// Holds the tunnel alone, without the kernel half: for nodes where eBPF is not wanted. Takes the place of the upstream
    /// konnectivity-agent, and dials only what a policy names.
    Agent(Box<AgentArgs>),
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

/// `nodeguard run`. A flag that is given twice counts the second time, as upstream's do.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
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
    /// Has the kernel measure how long its programs run, for `status` and the metrics. Costs some nanoseconds a packet, of every
    /// eBPF program on the node, and takes CAP_SYS_ADMIN.
    #[arg(long)]
    pub program_stats: bool,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Advertises the addresses of this node's pods to the proxy-servers too, as far as tunnel.dial names them: a dial to a pod then comes to
    /// its own node. Needs the host's process ids (hostPID), or a CNI with a route for each pod.
    #[arg(long)]
    pub advertise_pod_addresses: bool,
    /// Reads the cluster's Services and EndpointSlices: a dial to a ClusterIP then goes to an endpoint, a local one first, that is judged as any
    /// other address. Needs read access (deploy/services.yaml), with --kubeconfig or as a pod.
    #[arg(long, env = "NODEGUARD_WATCH_SERVICES")]
    pub watch_services: bool,
    /// The audit file.
    #[command(flatten)]
    pub audit: AuditArgs,
    /// What the control plane may use.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// The flags of the upstream konnectivity-agent.
    #[command(flatten)]
    pub agent: UpstreamArgs,
}

/// `nodeguard agent`.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct AgentArgs {
    /// The policy file, of which `tunnel.dial` counts; edits come into force by themselves.
    #[arg(long, required_unless_present = "dial_anything")]
    pub policy: Option<PathBuf>,
    /// Dials whatever the control plane asks for, loopback included, as the upstream agent does; only link-local addresses (cloud
    /// metadata) and multicast stay refused. Instead of a policy, and a weakness: it is told on every start and in `status`.
    #[arg(long, conflicts_with = "policy")]
    pub dial_anything: bool,
    /// Where `nodeguard status` asks [default: nowhere].
    #[arg(long)]
    pub admin_socket: Option<PathBuf>,
    /// The node's name in the cluster: a dial to it is a dial to the node's address.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// How long open dials may go on after SIGTERM.
    #[arg(long, value_parser = duration, default_value = "25s")]
    pub drain_timeout: Duration,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Advertises the addresses of this node's pods to the proxy-servers too, as far as tunnel.dial names them: a dial to a pod then comes to
    /// its own node. Needs the host's process ids (hostPID), or a CNI with a route for each pod.
    #[arg(long, conflicts_with = "dial_anything")]
    pub advertise_pod_addresses: bool,
    /// Reads the cluster's Services and EndpointSlices: a dial to a ClusterIP then goes to an endpoint, a local one first, that is judged as any
    /// other address. Needs read access (deploy/services.yaml), with --kubeconfig or as a pod.
    #[arg(long, env = "NODEGUARD_WATCH_SERVICES")]
    pub watch_services: bool,
    /// The audit file.
    #[command(flatten)]
    pub audit: AuditArgs,
    /// What the control plane may use.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// The flags of the upstream konnectivity-agent.
    #[command(flatten)]
    pub agent: UpstreamArgs,
}

/// Where the record of each dial goes beside the log.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Audit")]
pub struct AuditArgs {
    /// A file for the record of each dial, one JSON object a line [default: none; the log has them always].
    #[arg(long)]
    pub audit_file: Option<PathBuf>,
    /// How large the file may get before it is moved to FILE.1, as in `100Mi`; at least 1Mi.
    #[arg(long, value_parser = file_size, default_value = "100Mi", value_name = "SIZE")]
    pub audit_file_max_size: u64,
    /// How many moved files are kept.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub audit_file_max_backups: u32,
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
    fn a_flag_that_is_given_twice_counts_the_second_time() {
        let words = "nodeguard agent --policy=p --keepalive-time=1h --keepalive-time=60s -v=4 --v=2 --sync-forever --sync-forever=false";
        let Command::Agent(args) = Cli::try_parse_from(words.split(' ')).unwrap().command else { panic!("not agent") };
        assert_eq!((args.agent.keepalive_time, args.agent.klog.v.as_str()), (Duration::from_secs(60), "2"));
        assert!(!args.agent.sync_forever);
    }

    #[test]
    fn sizes_are_those_of_kubernetes() {
        let size = file_size;
        assert_eq!((size("100Mi"), size("1048576"), size("2Gi")), (Ok(100 << 20), Ok(1 << 20), Ok(2 << 30)));
        for text in ["", "Mi", "1", "1023Ki", "1M", "-1Mi", "1.5Mi", "99999999999999Gi", "+2Mi"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
