//! Owns counting the proxy-servers by their leases in the API server.
//! Called by `Tunnel::run`, beside the set.
//! Must never count a lease that is over, and never take "cannot ask" for "there are none": the last count stays.

use std::{
    collections::BTreeMap,
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

use super::{
    kube::{Api, ApiError},
    set::MOST_SERVERS,
};
use crate::lock::lock;

/// Which leases count.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// How to reach the API server; as a pod does, without one.
    pub kubeconfig: Option<PathBuf>,
    /// Their namespace.
    pub namespace: String,
    /// Their label, as a selector.
    pub label: String,
    /// How often they are counted. A list out of the API server's cache costs it little; upstream's watch gets each renewal of each lease.
    pub every: Duration,
}

/// The count.
pub(super) struct Leases {
    config: LeaseConfig,
    /// 1 until it is known.
    count: AtomicU32,
    error: Mutex<Option<String>>,
    /// How many lists were answered with which code and reason; 0 is none at all.
    lists: Mutex<BTreeMap<(u16, String), u64>>,
}

impl Leases {
    /// Not counted yet.
    pub(super) fn new(config: LeaseConfig) -> Leases {
        Leases { config, count: AtomicU32::new(1), error: Mutex::default(), lists: Mutex::default() }
    }

    /// How many servers there are.
    pub(super) fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// What `status` and the metrics say.
    pub(super) fn snapshot(&self) -> Value {
        let lists = lock(&self.lists);
        let lists: Vec<Value> = lists
            .iter()
            .map(|((code, reason), count)| serde_json::json!({"code": code, "reason": reason, "count": count}))
            .collect();
        serde_json::json!({ "count": self.count(), "lastError": *lock(&self.error), "lists": lists })
    }

    /// Counts for good; tells whoever waits when the number is another.
    pub(super) async fn watch(&self, changed: &Notify) {
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
        let answer = match Api::new(self.config.kubeconfig.as_deref()) {
            Ok(api) => api.get(path).await,
            Err(error) => Err(error),
        };
        let (code, reason) = match &answer {
            Ok(_) => (200, String::new()),
            Err(ApiError::Status { code, reason, .. }) => (*code, reason.clone()),
            Err(
                ApiError::Config(_) | ApiError::Tls(_) | ApiError::Io(_) | ApiError::Patience | ApiError::Answer(_),
            ) => (0, String::new()),
        };
        *lock(&self.lists).entry((code, reason)).or_default() += 1;
        tracing::debug!(code, seconds = started.elapsed().as_secs_f64(), "server leases listed");
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
    fn a_selector_is_escaped() {
        assert_eq!(escaped("k8s-app=konnectivity-server,a in (b)"), "k8s-app%3Dkonnectivity-server%2Ca%20in%20%28b%29");
    }
}
