//! Owns the flags of the upstream konnectivity-agent (v0.36.0): each is accepted, with upstream's default, in Go's notation.
//! Called by `args` for `run` and `agent`, and by `config`, which resolves them.
//! Must never silently accept a flag without effect: `without_effect` names those.

use std::{convert::Infallible, path::PathBuf, time::Duration};

use clap::{ArgAction, Args};
use guard_policy::pin::Pin;

use crate::{
    net::verify::San,
    sys::units::{boolean, duration},
};

/// The content type that upstream uses with the API server.
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// The flags of the upstream konnectivity-agent (v0.36.0), with its defaults.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Tunnel (the flags of konnectivity-agent)")]
pub struct UpstreamArgs {
    /// The proxy-server as a host with an optional port. Its certificate must be valid for this name or address. Several servers are separated by
    /// commas, or the flag is repeated. The agent connects to each server, and to each address of a name.
    #[arg(long, default_value = "127.0.0.1", value_delimiter = ',')]
    pub proxy_server_host: Vec<String>,
    /// The port of proxy-servers that are given without a port.
    #[arg(long, default_value_t = 8091)]
    pub proxy_server_port: u16,
    /// CA certificates (PEM). One of them must have issued the proxy-server's certificate; no other CA is trusted.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub ca_cert: PathBuf,
    /// The client certificate chain (PEM); requires --agent-key.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub agent_cert: PathBuf,
    /// The key of the client certificate (PEM); requires --agent-cert.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub agent_key: PathBuf,
    /// Protocols that the TLS handshake offers before h2.
    #[arg(long, value_delimiter = ',')]
    alpn_proto: Vec<String>,
    /// The file of a service-account token to send. It is read for each new connection.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub service_account_token_path: PathBuf,
    /// The id of this agent [default: random]. Each stream appends a part of its own.
    #[arg(long, env = "PROXY_AGENT_ID")]
    pub agent_id: Option<String>,
    /// The addresses and names that this agent advertises, as in `ipv4=10.0.0.1&host=node1` [default: those of the node].
    #[arg(long)]
    pub agent_identifiers: Option<String>,
    /// The pause before a new connection attempt, which grows by half each time, and the pause between searches for more servers.
    #[arg(long, value_parser = duration, default_value = "1s")]
    pub sync_interval: Duration,
    /// The longest pause before a new connection attempt.
    #[arg(long, value_parser = duration, default_value = "10s")]
    pub sync_interval_cap: Duration,
    /// How often an idle tunnel is probed. Servers close a tunnel that is probed more often than every 30s.
    #[arg(long, value_parser = duration, default_value = "1h")]
    pub keepalive_time: Duration,
    /// The address of the health port [default: all addresses].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub health_server_host: String,
    /// The port of /healthz, /readyz and /metrics; 0 disables it.
    #[arg(long, default_value_t = 8093)]
    pub health_server_port: u16,
    /// How often upstream checks whether its streams are alive. Accepted without effect: here a stream reports its end by itself.
    #[arg(long, value_parser = duration, default_value = "1s", hide = true)]
    pub probe_interval: Duration,
    /// How many packets may wait for one backend upstream. Accepted without effect: here a connection has a budget of bytes.
    #[arg(long, default_value_t = 150, hide = true)]
    pub xfr_channel_size: u32,
    /// Whether upstream logs that a queue is full. Accepted without effect: here a stalled backend is always logged.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub warn_on_channel_limit: bool,
    /// Keep looking for servers after the advertised number is connected.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    pub sync_forever: bool,
    /// Count the servers by their leases.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set)]
    pub count_server_leases: bool,
    /// The namespace of the server leases.
    #[arg(long, default_value = "kube-system")]
    pub lease_namespace: String,
    /// The label selector of the server leases.
    #[arg(long, alias = "lease-label-selector", default_value = "k8s-app=konnectivity-server")]
    pub lease_label: String,
    /// Where the number of servers comes from: `default` (the leases if they are counted, otherwise the servers' responses) or `max` (the larger).
    #[arg(long, default_value = "default", value_parser = ["", "default", "max"])]
    pub server_count_source: String,
    /// The kubeconfig for the API server, to read leases and Services [default: the pod's service account].
    #[arg(long, default_value = "", hide_default_value = true, value_parser = path)]
    pub kubeconfig: PathBuf,
    /// The content type of requests to the API server. Accepted without effect.
    #[arg(long, default_value = PROTOBUF, hide = true)]
    pub kube_api_content_type: String,
    /// The address of upstream's admin port. `nodeguard agent` redirects its /metrics to the health port; `run` has no admin port.
    #[arg(long, default_value = "127.0.0.1", hide = true)]
    pub admin_bind_address: String,
    /// The admin port of upstream.
    #[arg(long, default_value_t = 8094, hide = true)]
    pub admin_server_port: u16,
    /// Whether upstream serves Go's profiles. Accepted without effect.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub enable_profiling: bool,
    /// Whether upstream profiles lock contention. Accepted without effect.
    #[arg(long, value_parser = boolean, default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set, hide = true)]
    pub enable_contention_profiling: bool,
    /// Demands on the proxy-server that upstream does not have.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// The flags of Go's logger.
    #[command(flatten)]
    pub klog: KlogArgs,
}

/// Flags that the upstream agent does not have. Each only adds a demand to that of the CA file.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Tunnel (beyond konnectivity-agent)")]
pub struct TrustArgs {
    /// A pin of the proxy-server's public key, as in `sha256/BASE64` of its SubjectPublicKeyInfo. With several pins, one must match.
    #[arg(long, value_delimiter = ',')]
    pub server_spki_pin: Vec<Pin>,
    /// A name that the proxy-server's certificate must have in addition to the dialled one: `DNS:name`, `IP:address` or `URI:spiffe://...`. With
    /// several names, one must match.
    #[arg(long, value_delimiter = ',')]
    pub server_san: Vec<San>,
    /// The oldest TLS version that is accepted: `1.2` or `1.3`, or in the notation of upstream's server `VersionTLS12` or `VersionTLS13`.
    #[arg(long, default_value = "1.2", value_parser = ["1.2", "1.3", "VersionTLS12", "VersionTLS13"])]
    pub tls_min_version: String,
    /// Certificate revocation lists (PEM). A revoked proxy-server certificate is rejected; each CA of its chain, except the root, needs a list.
    #[arg(long)]
    pub crl_file: Option<PathBuf>,
    /// The age at which a stream is replaced by a new one. The old stream serves its open connections to their end [default: no limit].
    #[arg(long, value_parser = duration)]
    pub max_stream_age: Option<Duration>,
}

/// The flags of Go's logger, accepted so that a manifest of the upstream agent works without change. They have no effect; use `--log-format` and
/// `RUST_LOG`.
#[derive(Clone, Debug, Args)]
#[expect(missing_docs, reason = "these are Go's flags, without effect here")]
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
    /// Whether a flag has another value than Go's default.
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
    /// The protocols to offer before h2. Go writes a list in brackets, and an empty list as `[]`.
    pub fn alpn(&self) -> Vec<String> {
        let bare = self.alpn_proto.iter().map(|id| id.trim_matches(['[', ']']).to_owned());
        bare.filter(|id| !id.is_empty()).collect()
    }

    /// The given flags that have no effect here. The log names them once.
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

/// A path, which may be empty: in Go an empty path means none.
fn path(text: &str) -> Result<PathBuf, Infallible> {
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

    /// The command line of an agent in upstream's test framework: every flag, some with empty values.
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
