//! Owns the command line as typed arguments.
//! Called by `main`, `config` and `check_policy`.
//! Must never read the machine, or the environment except through clap: `config` resolves the arguments.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    cli::{limit_args::LimitArgs, upstream_flags::UpstreamArgs},
    sys::units::{duration, file_size},
};

/// Guards the ports of a Kubernetes node: only the control plane, through its Konnectivity tunnel, and the peers that a policy names can reach
/// them.
#[derive(Debug, Parser)]
#[command(name = "nodeguard", version, max_term_width = 120)]
#[command(
    after_help = "Exit codes: 0 success, 1 failure or an error in the policy, 2 wrong usage, 3 no daemon answers."
)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Guards this node: enforces the policy in the kernel, serves the tunnel and admits its connections.
    Run(Box<RunArgs>),
    /// Serves only the tunnel, without eBPF. Replaces the upstream konnectivity-agent, and dials only what a policy names.
    Agent(Box<AgentArgs>),
    /// Checks a policy file without applying it.
    Check {
        /// The policy file.
        file: PathBuf,
        /// The output format.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Shows the state of the guard on this node: mode, policy, programs, tunnel, counters, latest denials.
    Status {
        /// The socket of the daemon.
        #[arg(long, default_value = ADMIN_SOCKET)]
        admin_socket: PathBuf,
        /// The directory of the pins, which are read if no daemon answers.
        #[arg(long, default_value = BPFFS)]
        bpffs: PathBuf,
        /// The output format.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Removes the guard from the kernel and shows which ports are open afterwards. Enforcement outlives the daemon; only this command ends it.
    Unpin {
        /// The socket of the daemon, which must not run: it would restore everything.
        #[arg(long, default_value = ADMIN_SOCKET)]
        admin_socket: PathBuf,
        /// The directory of the pins.
        #[arg(long, default_value = BPFFS)]
        bpffs: PathBuf,
        /// The output format.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
}

/// The default path of the daemon's socket.
pub const ADMIN_SOCKET: &str = "/run/nodeguard/admin.sock";
/// The default directory of the pins.
pub const BPFFS: &str = "/sys/fs/bpf/nodeguard";

/// The output format of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables for people.
    #[default]
    Table,
    /// JSON with a stable schema, for programs.
    Json,
}

/// The format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// `nodeguard run`. If a flag is given twice, the second value counts, as in the upstream agent.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct RunArgs {
    /// The policy file. Edits come into force without a restart.
    #[arg(long)]
    pub policy: PathBuf,
    /// The cgroup v2 directory whose sockets are guarded [default: the root of the hierarchy, which is the whole node].
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// The directory on a bpf file system in which programs and maps are pinned.
    #[arg(long, default_value = BPFFS)]
    pub bpffs: PathBuf,
    /// The socket for `nodeguard status`.
    #[arg(long, default_value = ADMIN_SOCKET)]
    pub admin_socket: PathBuf,
    /// Lets the kernel measure the run time of its programs, for `status` and the metrics. This costs some nanoseconds per run of every eBPF
    /// program on the node, and needs CAP_SYS_ADMIN.
    #[arg(long, display_order = 6)] // Shown after --drain-timeout.
    pub program_stats: bool,
    /// The tunnel half.
    #[command(flatten)]
    pub half: TunnelHalfArgs,
}

/// `nodeguard agent`.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct AgentArgs {
    /// The policy file, of which only `tunnel.dial` is used. Edits come into force without a restart.
    #[arg(long, required_unless_present = "dial_anything")]
    pub policy: Option<PathBuf>,
    /// Dials any address, including loopback, as the upstream agent does; only link-local addresses, those of cloud metadata, and multicast
    /// addresses are refused. Replaces --policy. This weakens protection, so the log reports it at every start, and `status` shows it.
    #[arg(long, conflicts_with_all = ["policy", "advertise_pod_addresses"])]
    pub dial_anything: bool,
    /// The socket for `nodeguard status` [default: none].
    #[arg(long)]
    pub admin_socket: Option<PathBuf>,
    /// The tunnel half.
    #[command(flatten)]
    pub half: TunnelHalfArgs,
}

/// The flags of the tunnel half, which both daemons have.
#[derive(Clone, Debug, Args)]
pub struct TunnelHalfArgs {
    /// The node's name in the cluster. A dial to this name goes to the node's address.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// How long open dials may continue after SIGTERM.
    #[arg(long, value_parser = duration, default_value = "25s")]
    pub drain_timeout: Duration,
    /// The format of the log.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Also advertises the addresses of this node's pods that tunnel.dial names, so that the proxy-server sends a dial to a pod to the pod's own
    /// node. Needs the host's process ids (hostPID), or a CNI with a route for each pod.
    #[arg(long)]
    pub advertise_pod_addresses: bool,
    /// Reads the cluster's Services and EndpointSlices, so that a dial to a ClusterIP goes to an endpoint, preferably on this node. The endpoint's
    /// address is judged like any other. Needs read access (deploy/services.yaml), with --kubeconfig or as a pod.
    #[arg(long, env = "NODEGUARD_WATCH_SERVICES")]
    pub watch_services: bool,
    /// The audit file.
    #[command(flatten)]
    pub audit: AuditArgs,
    /// The limits for the control plane.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// The flags of the upstream konnectivity-agent.
    #[command(flatten)]
    pub agent: UpstreamArgs,
}

/// The file for the records of dials. The log has them too.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Audit")]
pub struct AuditArgs {
    /// A file for the record of each dial, one JSON object per line [default: none; the log always has the records].
    #[arg(long)]
    pub audit_file: Option<PathBuf>,
    /// The size at which the audit file is renamed to FILE.1, as in `100Mi`; at least 1Mi.
    #[arg(long, value_parser = file_size, default_value = "100Mi", value_name = "SIZE")]
    pub audit_file_max_size: u64,
    /// How many renamed audit files are kept.
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
        assert_eq!((args.half.agent.keepalive_time, args.half.agent.klog.v.as_str()), (Duration::from_secs(60), "2"));
        assert!(!args.half.agent.sync_forever);
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
