//! Owns the flags of the upstream konnectivity-agent (v0.36.0): every one is taken, with its default, and as Go writes its values.
//! Called by `args` for `run` and `agent`; `config` resolves them.
//! Must never take a flag silently that does nothing: `without_effect` names those.

use std::{path::PathBuf, time::Duration};

use clap::{ArgAction, Args};
use guard_policy::pin::Pin;

use crate::{
    net::verify::San,
    sys::units::{boolean, duration},
};

/// What upstream speaks to the API server.
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// The flags of the upstream konnectivity-agent (v0.36.0), with its defaults.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Tunnel (the flags of konnectivity-agent)")]
pub struct UpstreamArgs {
    /// The host of the proxy-server, with or without a port; its certificate must be for this name or address. May be given several times
    /// or with commas: each is dialled, and each address that a name has.
    #[arg(long, default_value = "127.0.0.1", value_delimiter = ',')]
    pub proxy_server_host: Vec<String>,
    /// The agent port of the proxy-servers that are named without one.
    #[arg(long, default_value_t = 8091)]
    pub proxy_server_port: u16,
    /// The CA certificates (PEM) that the proxy-server's certificate must come from. There is no other trust.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub ca_cert: PathBuf,
    /// The client certificate chain (PEM); needs --agent-key.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub agent_cert: PathBuf,
    /// The client certificate's key (PEM); needs --agent-cert.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub agent_key: PathBuf,
    /// Protocols to offer in the TLS handshake before h2.
    #[arg(long, value_delimiter = ',')]
    alpn_proto: Vec<String>,
    /// A service-account token to send, read anew for each connection.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub service_account_token_path: PathBuf,
    /// The id of this agent [default: random]. Each stream adds a part of its own.
    #[arg(long, env = "PROXY_AGENT_ID")]
    pub agent_id: Option<String>,
    /// What the control plane may dial this agent by, as in `ipv4=10.0.0.1&host=node1` [default: the node's addresses and names].
    #[arg(long)]
    pub agent_identifiers: Option<String>,
    /// The first wait before a new connection attempt, which grows by half each time; and the wait between looks for another server.
    #[arg(long, value_parser = duration, default_value = "1s")]
    pub sync_interval: Duration,
    /// The longest wait before a new connection attempt.
    #[arg(long, value_parser = duration, default_value = "10s")]
    pub sync_interval_cap: Duration,
    /// How often the tunnel is probed when it is idle; at least 30s, or the server ends it.
    #[arg(long, value_parser = duration, default_value = "1h")]
    pub keepalive_time: Duration,
    /// The address of the health port [default: all].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub health_server_host: String,
    /// The health port: /healthz, /readyz, /metrics. 0 serves none.
    #[arg(long, default_value_t = 8093)]
    pub health_server_port: u16,
    /// How often upstream looks whether its streams are alive. Taken and not needed: here a stream says so itself.
    #[arg(long, value_parser = duration, default_value = "1s", hide = true)]
    pub probe_interval: Duration,
    /// How many packets may wait for one backend upstream. Taken and not needed: here a connection has a budget of bytes.
    #[arg(long, default_value_t = 150, hide = true)]
    pub xfr_channel_size: u32,
    /// Whether upstream says that a queue is full. Taken and not needed: a stalled backend is always told.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub warn_on_channel_limit: bool,
    /// Whether to look for more servers than there are said to be.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    pub sync_forever: bool,
    /// Whether the servers are counted by their leases.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    pub count_server_leases: bool,
    /// The namespace of the leases.
    #[arg(long, default_value = "kube-system")]
    pub lease_namespace: String,
    /// The label of the leases.
    #[arg(long, alias = "lease-label-selector", default_value = "k8s-app=konnectivity-server")]
    pub lease_label: String,
    /// Where the number of servers comes from: `default` (the leases if they are counted, else what the servers say) or `max` (the larger).
    #[arg(long, default_value = "default", value_parser = ["", "default", "max"])]
    pub server_count_source: String,
    /// How to reach the API server for leases [default: as a pod does].
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub kubeconfig: PathBuf,
    /// The format of the API server's answers.
    #[arg(long, default_value = PROTOBUF, hide = true)]
    pub kube_api_content_type: String,
    /// The address of upstream's admin port. `nodeguard agent` sends scrapers of its /metrics on to the health port; `run` has no such port.
    #[arg(long, default_value = "127.0.0.1", hide = true)]
    pub admin_bind_address: String,
    /// Upstream's admin port.
    #[arg(long, default_value_t = 8094, hide = true)]
    pub admin_server_port: u16,
    /// Whether upstream serves Go's profiles.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub enable_profiling: bool,
    /// The same for locks.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub enable_contention_profiling: bool,
    /// What is asked of the proxy-server beyond upstream.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// The flags of Go's logger.
    #[command(flatten)]
    pub klog: KlogArgs,
}

/// What upstream's agent has no flag for. Each only asks for more than the CA file does.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Tunnel (beyond konnectivity-agent)")]
pub struct TrustArgs {
    /// The proxy-server's key must be this one, as `sha256/BASE64` of its SubjectPublicKeyInfo; one of several, if given several times.
    #[arg(long, value_delimiter = ',')]
    pub server_spki_pin: Vec<Pin>,
    /// The proxy-server's certificate must hold this name beside the one that is dialled: `DNS:name`, `IP:address` or `URI:spiffe://...`; one
    /// of several, if given several times.
    #[arg(long, value_delimiter = ',')]
    pub server_san: Vec<San>,
    /// The oldest TLS version to speak: `1.2` or `1.3` (or as upstream's server writes it, VersionTLS12 or VersionTLS13).
    #[arg(long, default_value = "1.2", value_parser = ["1.2", "1.3", "VersionTLS12", "VersionTLS13"])]
    pub tls_min_version: String,
    /// Certificate revocation lists (PEM) that the proxy-server's certificate must not be in; every CA of its chain below the root needs one.
    #[arg(long)]
    pub crl_file: Option<PathBuf>,
    /// How old a stream may become: then another takes its place, and it serves what it carries to the end [default: no limit].
    #[arg(long, value_parser = duration)]
    pub max_stream_age: Option<Duration>,
}

/// The flags of Go's logger: taken, so that a manifest of the upstream agent works as it is. `--log-format` and `RUST_LOG` are ours.
#[derive(Clone, Debug, Args)]
#[expect(missing_docs, reason = "they are Go's, and nothing is done with them")]
pub struct KlogArgs {
    #[arg(short = 'v', long = "v", id = "klog_v", value_name = "LEVEL", default_value = "4", hide = true)]
    pub v: String,
    #[arg(long, default_value = "false", value_parser = boolean, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub add_dir_header: bool,
    #[arg(long, default_value = "false", value_parser = boolean, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub alsologtostderr: bool,
    #[arg(long, default_value = "true", value_parser = boolean, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub legacy_stderr_threshold_behavior: bool,
    #[arg(long, default_value = "true", value_parser = boolean, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub logtostderr: bool,
    #[arg(long, default_value = "false", value_parser = boolean, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub one_output: bool,
    #[arg(long, default_value = "false", value_parser = boolean, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub skip_headers: bool,
    #[arg(long, default_value = "false", value_parser = boolean, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub skip_log_headers: bool,
    #[arg(long, default_value = "", hide = true)]
    pub alsologtostderrthreshold: String,
    #[arg(long, default_value = ":0", hide = true)]
    pub log_backtrace_at: String,
    #[arg(long, default_value = "", hide = true)]
    pub log_dir: String,
    #[arg(long, default_value = "", hide = true)]
    pub log_file: String,
    #[arg(long, default_value = "1800", hide = true)]
    pub log_file_max_size: String,
    #[arg(long, default_value = "2", hide = true)]
    pub stderrthreshold: String,
    #[arg(long, default_value = "", hide = true)]
    pub vmodule: String,
}

impl KlogArgs {
    /// Whether any is set to another value than Go's.
    fn given(&self) -> bool {
        let KlogArgs { v, add_dir_header, alsologtostderr, legacy_stderr_threshold_behavior, logtostderr, .. } = self;
        let KlogArgs { one_output, skip_headers, skip_log_headers, alsologtostderrthreshold, log_backtrace_at, .. } =
            self;
        let KlogArgs { log_dir, log_file, log_file_max_size, stderrthreshold, vmodule, .. } = self;
        let switched = [*add_dir_header, *alsologtostderr, *one_output, *skip_headers, *skip_log_headers];
        let values = [(v, "4"), (log_backtrace_at, ":0"), (log_file_max_size, "1800"), (stderrthreshold, "2")];
        let texts = [alsologtostderrthreshold, log_dir, log_file, vmodule];
        switched.contains(&true)
            || !(*legacy_stderr_threshold_behavior && *logtostderr)
            || values.iter().any(|(value, default)| value.as_str() != *default)
            || texts.iter().any(|text| !text.is_empty())
    }
}

impl UpstreamArgs {
    /// The protocols to offer before h2. Go writes a list in brackets, and an empty one as `[]`.
    pub fn alpn(&self) -> Vec<String> {
        let bare = self.alpn_proto.iter().map(|id| id.trim_matches(['[', ']']).to_owned());
        bare.filter(|id| !id.is_empty()).collect()
    }

    /// The flags that were given and do nothing here: the log says so once.
    pub fn without_effect(&self) -> Vec<&'static str> {
        [
            (self.probe_interval != Duration::from_secs(1), "--probe-interval"),
            (self.xfr_channel_size != 150, "--xfr-channel-size"),
            (self.warn_on_channel_limit, "--warn-on-channel-limit"),
            (self.enable_profiling, "--enable-profiling"),
            (self.enable_contention_profiling, "--enable-contention-profiling"),
            (self.kube_api_content_type != PROTOBUF, "--kube-api-content-type"),
            (self.klog.given(), "the flags of klog"),
        ]
        .into_iter()
        .filter_map(|(given, flag)| given.then_some(flag))
        .collect()
    }
}

/// A path; an empty one is none, as in Go.
fn path(text: &str) -> Result<PathBuf, String> {
    Ok(PathBuf::from(text))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct UpstreamLine {
        #[command(flatten)]
        upstream: UpstreamArgs,
    }

    /// What the upstream test framework starts an agent with: every flag, with empty values.
    const ALL: &str = "--admin-bind-address=127.0.0.1 --admin-server-port=40001 --agent-cert=a.crt --agent-id= --agent-identifiers= \
        --agent-key=a.key --alpn-proto=[] --ca-cert=ca.crt --count-server-leases=false --enable-contention-profiling=false \
        --enable-profiling=false --health-server-host=127.0.0.1 --health-server-port=40000 --keepalive-time=1h0m0s \
        --kube-api-content-type=application/vnd.kubernetes.protobuf --kubeconfig= --lease-label=k8s-app=konnectivity-server \
        --lease-namespace=kube-system --probe-interval=100ms --proxy-server-host=127.0.0.1 --proxy-server-port=40002 \
        --server-count-source=default --service-account-token-path= --sync-forever=false --sync-interval=100ms \
        --sync-interval-cap=1s --warn-on-channel-limit=false --xfr-channel-size=150";

    #[test]
    fn every_upstream_flag_is_taken_as_go_writes_it() {
        let line = UpstreamLine::try_parse_from(["agent"].into_iter().chain(ALL.split_whitespace())).unwrap().upstream;
        assert_eq!(line.sync_interval, Duration::from_millis(100));
        assert!(line.alpn().is_empty() && !line.count_server_leases);
        assert_eq!(line.without_effect(), ["--probe-interval"]);
        let more = ["agent", "--sync-forever", "--alpn-proto=[a,b]", "-v=4", "--logtostderr=true", "--vmodule=x=5"];
        let line = UpstreamLine::try_parse_from(more).unwrap().upstream;
        assert!(line.sync_forever);
        assert_eq!(line.alpn(), ["a", "b"]);
        assert_eq!(line.without_effect(), ["the flags of klog"]);
        assert!(UpstreamLine::try_parse_from(["agent", "--sync-forever=perhaps"]).is_err());
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
