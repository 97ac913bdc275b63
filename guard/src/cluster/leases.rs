//! Owns the number of proxy-servers according to their leases in the API server.
//! Called by `Tunnel::run`, beside the streams.
//! Must never count an expired lease, and never take "cannot ask" for "there are none": the last count stays.

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

use http_body_util::Limited;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::{
    Api,
    api::{ListParams, ObjectList},
};
use serde_json::Value;
use tokio::{sync::Notify, time::timeout};

use crate::{
    cluster::{
        api_server,
        api_server::{ApiServerError, PATIENCE, explain},
    },
    net::http_proxy::ProxyEnvironment,
    sys::{lock::lock, metrics_text::family},
};

/// The largest server count that is accepted; a higher claim is ignored.
pub(crate) const MOST_SERVERS: u32 = 128;
/// The largest list of leases, bytes.
const MOST_BYTES: usize = 4 << 20;

/// Which leases count.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// How to reach the API server; without one, as a pod does.
    pub kubeconfig: Option<PathBuf>,
    /// The HTTP proxy on the way there, if any.
    pub environment: ProxyEnvironment,
    /// The namespace of the leases.
    pub namespace: String,
    /// The label selector of the leases.
    pub label: String,
    /// How often they are counted. A list from the API server's cache is cheap; upstream's watch receives each renewal of each lease.
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

    /// Counts the leases regularly and notifies about a new number. Never ends.
    pub(crate) async fn watch(&self, changed: &Notify) {
        let LeaseConfig { kubeconfig, environment, namespace, label, every } = &self.config;
        let client = api_server::client(kubeconfig.clone(), environment.clone(), PATIENCE, |answer| {
            answer.map(|body| Limited::new(body, MOST_BYTES))
        });
        let leases = Api::namespaced(client, namespace);
        // Version 0: from the API server's cache.
        let parameters = ListParams::default().labels(label).at("0");
        loop {
            self.list(&leases, &parameters, changed).await;
            tokio::time::sleep(every.mul_f64(1.0 + 0.1 * rand::random::<f64>())).await;
        }
    }

    async fn list(&self, leases: &Api<Lease>, parameters: &ListParams, changed: &Notify) {
        let started = Instant::now();
        let no_answer = |_| Err(kube::Error::Service(Box::new(ApiServerError::Timeout)));
        let answer = timeout(PATIENCE, leases.list(parameters)).await.unwrap_or_else(no_answer);
        let seconds = started.elapsed().as_secs_f64();
        if answer.is_ok() {
            lock(&ANSWERED).count(200, "", seconds);
        } else if let Err(kube::Error::Api(status)) = &answer {
            lock(&ANSWERED).count(status.code, &status.reason, seconds);
        }
        match answer {
            Ok(list) => {
                let count = count(&list, Timestamp::now());
                *lock(&self.error) = None;
                let before = self.count.swap(count, Ordering::Relaxed);
                if before != count {
                    tracing::info!(before, count, "the number of server leases has changed");
                    changed.notify_one();
                }
            }
            Err(error) => {
                let (error, count) = (explain(&error), self.count());
                let mut last = lock(&self.error);
                if last.as_ref() != Some(&error) {
                    tracing::error!(error, count, "cannot count the server leases; the previous count stays");
                }
                *last = Some(error);
            }
        }
    }
}

/// The number of valid leases; at least one server is assumed.
fn count(list: &ObjectList<Lease>, now: Timestamp) -> u32 {
    let valid = list.iter().filter_map(|lease| lease.spec.as_ref()).filter(|spec| is_valid(spec, now)).count();
    u32::try_from(valid).unwrap_or(MOST_SERVERS).clamp(1, MOST_SERVERS)
}

fn is_valid(spec: &LeaseSpec, now: Timestamp) -> bool {
    let renewed = spec.renew_time.as_ref().or(spec.acquire_time.as_ref());
    let until = renewed
        .zip(spec.lease_duration_seconds)
        .and_then(|(renewed, seconds)| renewed.0.checked_add(SignedDuration::from_secs(i64::from(seconds))).ok());
    until.is_some_and(|until| until > now)
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
            // The API server cannot return a lease that the type refuses.
            let spec = serde_json::from_value::<LeaseSpec>(spec);
            assert_eq!(spec.is_ok_and(|spec| is_valid(&spec, now)), *valid, "{item}");
        }
        let read = |list: Value| serde_json::from_value::<ObjectList<Lease>>(list);
        let list = |items: Vec<&Value>| read(serde_json::json!({ "metadata": {}, "items": items })).unwrap();
        let lease = |item: &&Value| serde_json::from_value::<Lease>((*item).clone()).is_ok();
        let all: Vec<&Value> = items.iter().map(|(item, _)| item).filter(lease).collect();
        assert_eq!((all.len(), count(&list(all), now)), (5, 2));
        assert_eq!(count(&list(vec![]), now), 1);
        assert_eq!(count(&list((0..1000).map(|_| &items[0].0).collect()), now), MOST_SERVERS);
        assert!(read(serde_json::json!({"kind": "Status"})).is_err());
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
        let parameters = ListParams::default().labels("k8s-app=konnectivity-server,a in (b)").at("0");
        let request = kube::core::Request::new("/leases").list(&parameters).unwrap();
        let query = request.uri().query().unwrap();
        assert!(query.contains("labelSelector=k8s-app%3Dkonnectivity-server%2Ca+in+%28b%29"), "{query}");
        assert!(query.contains("resourceVersion=0"), "{query}");
    }
}
