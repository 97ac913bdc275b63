//! Owns counting the proxy-servers by their leases in the API server.
//! Called by `Tunnel::run`, beside the set.
//! Must never count a lease that is over, and never take "cannot ask" for "there are none": the last count stays.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::sync::Notify;

use crate::{
    cluster::api::{Api, ApiError},
    net::http_proxy::ProxyEnvironment,
    sys::{lock::lock, metrics_text::family},
};

/// A server that claims to be one of more is not believed.
pub(crate) const MOST_SERVERS: u32 = 128;

/// Which leases count.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// How to reach the API server; as a pod does, without one.
    pub kubeconfig: Option<PathBuf>,
    /// The HTTP proxy on the way there, if any.
    pub environment: ProxyEnvironment,
    /// Their namespace.
    pub namespace: String,
    /// Their label, as a selector.
    pub label: String,
    /// How often they are counted. A list out of the API server's cache costs it little; upstream's watch gets each renewal of each lease.
    pub every: Duration,
}

/// The count.
pub(crate) struct Leases {
    config: LeaseConfig,
    /// 1 until it is known.
    count: AtomicU32,
    error: Mutex<Option<String>>,
}

/// Answered lists, as upstream counts them; there is one tunnel in a process.
static ANSWERED: Mutex<Answered> = Mutex::new(Answered { lists: BTreeMap::new(), took: BTreeMap::new() });
/// Upstream's buckets, seconds.
const BUCKETS: [f64; 7] = [0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 30.0];

struct Answered {
    /// By code and reason.
    lists: BTreeMap<(u16, String), u64>,
    /// By code: how many in each bucket, and the sum of seconds.
    took: BTreeMap<u16, ([u64; BUCKETS.len() + 1], f64)>,
}

impl Answered {
    fn count(&mut self, code: u16, reason: &str, seconds: f64) {
        // A word of Kubernetes, or none: it becomes a label.
        let word = reason.len() <= 40 && reason.bytes().all(|byte| byte.is_ascii_alphanumeric());
        *self.lists.entry((code, if word { reason } else { "" }.to_owned())).or_default() += 1;
        let (counts, sum) = self.took.entry(code).or_default();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        if let Some(count) = counts.get_mut(bucket) {
            *count += 1;
        }
        *sum += seconds;
    }

    fn encode(&self, out: &mut String, prefix: &str) -> fmt::Result {
        if self.lists.is_empty() {
            return Ok(());
        }
        let name = format!("{prefix}lease_lists_total");
        let help = "Count of server lease list calls made by the agent to the k8s apiserver, labeled by HTTP response code and reason";
        family(out, &name, help, "counter")?;
        for ((code, reason), count) in &self.lists {
            writeln!(out, "{name}{{http_response_code=\"{code}\",reason=\"{reason}\"}} {count}")?;
        }
        let name = format!("{prefix}lease_list_latency_seconds");
        family(out, &name, "Latency of server lease listing in seconds", "histogram")?;
        for (code, (counts, sum)) in &self.took {
            let mut below = 0;
            for (bound, count) in BUCKETS.iter().map(f64::to_string).chain(["+Inf".to_owned()]).zip(counts) {
                below += count;
                writeln!(out, "{name}_bucket{{http_response_code=\"{code}\",le=\"{bound}\"}} {below}")?;
            }
            writeln!(out, "{name}_sum{{http_response_code=\"{code}\"}} {sum}")?;
            writeln!(out, "{name}_count{{http_response_code=\"{code}\"}} {below}")?;
        }
        Ok(())
    }
}

/// Writes upstream's families; as there, one that counts nothing is left out.
pub(crate) fn encode(out: &mut String, prefix: &str) -> fmt::Result {
    lock(&ANSWERED).encode(out, prefix)
}

impl Leases {
    /// Not counted yet.
    pub(crate) fn new(config: LeaseConfig) -> Leases {
        Leases { config, count: AtomicU32::new(1), error: Mutex::default() }
    }

    /// How many servers there are.
    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// What `status` and the metrics say.
    pub(crate) fn snapshot(&self) -> Value {
        serde_json::json!({ "count": self.count(), "lastError": *lock(&self.error) })
    }

    /// Counts for good; tells whoever waits when the number is another.
    pub(crate) async fn watch(&self, changed: &Notify) {
        let LeaseConfig { namespace, label, every, .. } = &self.config;
        let path = format!(
            "/apis/coordination.k8s.io/v1/namespaces/{}/leases?labelSelector={}&resourceVersion=0",
            escaped(namespace),
            escaped(label)
        );
        loop {
            self.list(&path, changed).await;
            tokio::time::sleep(every.mul_f64(1.0 + 0.1 * rand::random::<f64>())).await;
        }
    }

    async fn list(&self, path: &str, changed: &Notify) {
        let started = Instant::now();
        let answer = match Api::new(self.config.kubeconfig.as_deref(), &self.config.environment) {
            Ok(api) => api.get(path).await,
            Err(error) => Err(error),
        };
        let seconds = started.elapsed().as_secs_f64();
        match &answer {
            Ok(_) => lock(&ANSWERED).count(200, "", seconds),
            Err(ApiError::Status { code, reason, .. }) => lock(&ANSWERED).count(*code, reason, seconds),
            Err(
                ApiError::Config(_)
                | ApiError::Tls(_)
                | ApiError::Io(_)
                | ApiError::Proxy(_)
                | ApiError::Patience
                | ApiError::Answer(_),
            ) => {}
        }
        match answer.map_err(|error| error.to_string()).and_then(|list| count(&list, Timestamp::now())) {
            Ok(count) => {
                *lock(&self.error) = None;
                let before = self.count.swap(count, Ordering::Relaxed);
                if before != count {
                    tracing::info!(before, count, "another number of server leases");
                    changed.notify_one();
                }
            }
            Err(error) => {
                let count = self.count();
                let mut last = lock(&self.error);
                if last.as_ref() != Some(&error) {
                    tracing::error!(error, count, "the server leases cannot be counted; the count from before stays");
                }
                *last = Some(error);
            }
        }
    }
}

/// How many leases of a list are in force; at least one server is assumed.
fn count(list: &Value, now: Timestamp) -> Result<u32, String> {
    let items = list.get("items").and_then(Value::as_array).ok_or("the answer is no list of leases")?;
    let valid = items.iter().filter_map(|lease| lease.get("spec")).filter(|spec| is_valid(spec, now)).count();
    Ok(u32::try_from(valid).unwrap_or(MOST_SERVERS).clamp(1, MOST_SERVERS))
}

fn is_valid(spec: &Value, now: Timestamp) -> bool {
    let time = |name: &str| spec.get(name).and_then(Value::as_str).and_then(|text| text.parse::<Timestamp>().ok());
    let seconds = spec.get("leaseDurationSeconds").and_then(Value::as_i64);
    let renewed = time("renewTime").or_else(|| time("acquireTime"));
    let until = renewed
        .zip(seconds)
        .and_then(|(renewed, seconds)| renewed.checked_add(SignedDuration::from_secs(seconds)).ok());
    until.is_some_and(|until| until > now)
}

/// As a part of a URL.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_leases_in_force_count() {
        let now: Timestamp = "2026-11-24T20:00:00Z".parse().unwrap();
        let lease = |spec: Value| serde_json::json!({ "spec": spec });
        let items = [
            (lease(serde_json::json!({"renewTime": "2026-11-24T19:59:45.123456Z", "leaseDurationSeconds": 30})), true),
            (lease(serde_json::json!({"renewTime": "2026-11-24T19:59:30.000000Z", "leaseDurationSeconds": 30})), false),
            (lease(serde_json::json!({"acquireTime": "2026-11-24T19:59:59Z", "leaseDurationSeconds": 2})), true),
            (lease(serde_json::json!({"renewTime": "2026-11-24T19:59:59Z"})), false),
            (lease(serde_json::json!({"renewTime": "yesterday", "leaseDurationSeconds": 9999999})), false),
            (lease(serde_json::json!({"renewTime": "2026-11-24T19:59:59Z", "leaseDurationSeconds": i64::MAX})), false),
            (serde_json::json!({}), false),
        ];
        for (item, valid) in &items {
            let spec = item.get("spec").cloned().unwrap_or_default();
            assert_eq!(is_valid(&spec, now), *valid, "{item}");
        }
        let all: Vec<&Value> = items.iter().map(|(item, _)| item).collect();
        assert_eq!(count(&serde_json::json!({ "items": all }), now), Ok(2));
        assert_eq!(count(&serde_json::json!({ "items": [] }), now), Ok(1));
        let many: Vec<&Value> = (0..1000).map(|_| &items[0].0).collect();
        assert_eq!(count(&serde_json::json!({ "items": many }), now), Ok(MOST_SERVERS));
        assert!(count(&serde_json::json!({"kind": "Status"}), now).is_err());
    }

    #[test]
    fn answers_are_upstreams_metrics() {
        let mut answered = Answered { lists: BTreeMap::new(), took: BTreeMap::new() };
        let mut text = String::new();
        answered.encode(&mut text, "p_").unwrap();
        assert_eq!(text, "");
        answered.count(200, "", 0.05);
        answered.count(200, "", 60.0);
        answered.count(403, "Forbidden", 0.01);
        answered.count(500, "a \"quoted\" text", 0.01);
        answered.encode(&mut text, "p_").unwrap();
        for line in [
            "p_lease_lists_total{http_response_code=\"200\",reason=\"\"} 2",
            "p_lease_lists_total{http_response_code=\"403\",reason=\"Forbidden\"} 1",
            "p_lease_lists_total{http_response_code=\"500\",reason=\"\"} 1",
            "p_lease_list_latency_seconds_bucket{http_response_code=\"200\",le=\"0.1\"} 1",
            "p_lease_list_latency_seconds_bucket{http_response_code=\"200\",le=\"+Inf\"} 2",
            "p_lease_list_latency_seconds_count{http_response_code=\"403\"} 1",
        ] {
            assert!(text.lines().any(|each| each == line), "{line}: {text}");
        }
    }

    #[test]
    fn a_selector_is_escaped() {
        assert_eq!(escaped("k8s-app=konnectivity-server,a in (b)"), "k8s-app%3Dkonnectivity-server%2Ca%20in%20%28b%29");
    }
}
