//! Owns the number of proxy-servers according to their leases in the API server.
//! Called by `Tunnel::run`, beside the streams.
//! Must never count an expired lease, and never take "cannot ask" for "there are none": the last count stays.

use std::{
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
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, time::timeout};

use crate::{
    cluster::{
        api_server,
        api_server::{ApiServerError, PATIENCE, explain},
    },
    net::http_proxy::ProxyEnvironment,
    sys::{
        histogram::{Histogram, UPSTREAM_BUCKETS},
        lock::lock,
    },
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
    answers: Mutex<LeaseAnswers>,
}

/// The leases as `status` and the metrics show them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeasesState {
    /// How many servers have a lease; 1 until the first answer.
    pub count: u32,
    /// Why the last request failed, if it did.
    pub last_error: Option<String>,
    /// The answers of the API server.
    pub answers: LeaseAnswers,
}

/// The API server's answers to requests for leases, as the upstream agent counts them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LeaseAnswers {
    /// The number of answers, by HTTP status code and reason.
    pub lists: Vec<LeaseLists>,
    /// How long the answers took, by HTTP status code.
    pub latency: Vec<LeaseLatency>,
}

/// Answers with one status code and reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeaseLists {
    /// The HTTP status code.
    pub code: u16,
    /// The reason that Kubernetes gives for an error; empty if there is none.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// How long answers with one status code took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LeaseLatency {
    /// The HTTP status code.
    pub code: u16,
    /// The durations.
    pub seconds: Histogram,
}

impl LeaseAnswers {
    /// Counts an answer.
    pub(crate) fn add(&mut self, code: u16, reason: &str, took: Duration) {
        // The reason becomes a label: only a word as Kubernetes has them.
        let is_word = reason.len() <= 40 && reason.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let reason = if is_word { reason } else { "" };
        match self.lists.iter_mut().find(|lists| lists.code == code && lists.reason == reason) {
            Some(lists) => lists.count += 1,
            None => self.lists.push(LeaseLists { code, reason: reason.to_owned(), count: 1 }),
        }
        match self.latency.iter_mut().find(|latency| latency.code == code) {
            Some(latency) => latency.seconds.observe(took),
            None => {
                let mut seconds = Histogram::new(&UPSTREAM_BUCKETS);
                seconds.observe(took);
                self.latency.push(LeaseLatency { code, seconds });
            }
        }
    }
}

impl Leases {
    /// Not counted yet.
    pub(crate) fn new(config: LeaseConfig) -> Leases {
        Leases { config, count: AtomicU32::new(1), error: Mutex::default(), answers: Mutex::default() }
    }

    /// How many servers there are.
    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// The state for `status` and the metrics.
    pub(crate) fn state(&self) -> LeasesState {
        LeasesState { count: self.count(), last_error: lock(&self.error).clone(), answers: lock(&self.answers).clone() }
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
        let took = started.elapsed();
        if answer.is_ok() {
            lock(&self.answers).add(200, "", took);
        } else if let Err(kube::Error::Api(status)) = &answer {
            lock(&self.answers).add(status.code, &status.reason, took);
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
    use serde_json::Value;

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
    fn a_selector_is_escaped() {
        let parameters = ListParams::default().labels("k8s-app=konnectivity-server,a in (b)").at("0");
        let request = kube::core::Request::new("/leases").list(&parameters).unwrap();
        let query = request.uri().query().unwrap();
        assert!(query.contains("labelSelector=k8s-app%3Dkonnectivity-server%2Ca+in+%28b%29"), "{query}");
        assert!(query.contains("resourceVersion=0"), "{query}");
    }
}
