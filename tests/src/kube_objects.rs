//! Owns Services and EndpointSlices as an API server has them: lists, and watches that go on.
//! Called by `kube_api`, which answers with what is here; tests change the objects, and how it answers.
//! Must never forget a change that a watch has not seen, unless it is told to: then it says so, as the real one does (410).

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{Response, StatusCode, body::Frame};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// A body that may go on.
pub type Body = BoxBody<Bytes, Infallible>;

/// The kinds, by their part of a path, with version and kind of their lists.
const KINDS: [(&str, &str, &str); 2] = [
    ("/api/v1/services", "v1", "ServiceList"),
    ("/apis/discovery.k8s.io/v1/endpointslices", "discovery.k8s.io/v1", "EndpointSliceList"),
];

/// The objects.
pub struct Objects {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// What happened up to here is forgotten.
    forgotten: u64,
    all: BTreeMap<(&'static str, String), Value>,
    log: Vec<(u64, &'static str, Value)>,
    /// The code that answers everything.
    refused: Option<u16>,
    lists: usize,
}

impl Default for Objects {
    fn default() -> Objects {
        Objects { state: Mutex::default(), changed: watch::channel(0).0 }
    }
}

impl Objects {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, path: &'static str, name: &str, object: Option<Value>) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        let key = (path, name.to_owned());
        let event = match object {
            Some(mut object) => {
                if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
                    metadata.insert("resourceVersion".to_owned(), version.to_string().into());
                }
                let kind = if state.all.contains_key(&key) { "MODIFIED" } else { "ADDED" };
                state.all.insert(key, object.clone());
                json!({"type": kind, "object": object})
            }
            None => json!({"type": "DELETED", "object": state.all.remove(&key)}),
        };
        state.log.push((version, path, event));
        drop(state);
        self.changed.send_replace(version);
    }

    /// There is such a Service now, in the namespace `default`: its ClusterIP, its port and that one's name.
    pub fn service(&self, name: &str, address: &str, port: u16) {
        let object = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
            "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"name": "https", "port": port, "protocol": "TCP"}]},
        });
        self.change(KINDS[0].0, name, Some(object));
    }

    /// There is none of this name any more.
    pub fn no_service(&self, name: &str) {
        self.change(KINDS[0].0, name, None);
    }

    /// These are its endpoints now: address, node, whether it is ready; all at one port.
    pub fn endpoints(&self, service: &str, port: u16, all: &[(&str, &str, bool)]) {
        let endpoint = |(address, node, ready): &(&str, &str, bool)| json!({"addresses": [address], "nodeName": node, "conditions": {"ready": ready}});
        let object = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "default", "name": format!("{service}-x"), "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
            "endpoints": all.iter().map(endpoint).collect::<Vec<_>>(),
        });
        self.change(KINDS[1].0, &format!("{service}-x"), Some(object));
    }

    /// From now on everything is answered by this code, and watches end; or nothing is.
    pub fn refuse(&self, code: Option<u16>) {
        self.state().refused = code;
        self.changed.send_modify(|_| {});
    }

    /// What happened so far can no longer be watched: who has not seen it has to list anew.
    pub fn forget(&self) {
        let mut state = self.state();
        state.version += 1;
        state.forgotten = state.version;
        state.log.clear();
    }

    /// How often they were listed.
    pub fn lists(&self) -> usize {
        self.state().lists
    }

    /// The answer to a request, if it is about these.
    pub(crate) fn answer(self: &Arc<Self>, path: &str, query: &str) -> Option<Response<Body>> {
        let (path, version, kind) = KINDS.into_iter().find(|(known, ..)| *known == path)?;
        let parameter = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let mut state = self.state();
        if let Some(code) = state.refused {
            let reason = if code == 403 { "Forbidden" } else { "ServiceUnavailable" };
            let said = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": format!("{kind} refused in the lab"), "details": {}, "metadata": {}});
            return Some(response(code, Full::new(said.to_string().into()).boxed()));
        }
        if parameter("watch") == Some("true") {
            let since = parameter("resourceVersion").and_then(|since| since.parse().ok()).unwrap_or(0);
            let (lines, body) = mpsc::channel(16);
            drop(state);
            tokio::spawn(Arc::clone(self).tell(path, since, lines));
            return Some(response(
                200,
                BodyExt::boxed(StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(body))),
            ));
        }
        state.lists += 1;
        let items: Vec<&Value> =
            state.all.iter().filter(|((of, _), _)| *of == path).map(|(_, object)| object).collect();
        let list = json!({"kind": kind, "apiVersion": version, "metadata": {"resourceVersion": state.version.to_string()}, "items": items});
        Some(response(200, Full::new(list.to_string().into()).boxed()))
    }

    /// Tells every change since a version, one a line, until the API is gone or nobody listens.
    async fn tell(
        self: Arc<Self>,
        path: &'static str,
        mut since: u64,
        lines: mpsc::Sender<Result<Frame<Bytes>, Infallible>>,
    ) {
        let mut changed = self.changed.subscribe();
        loop {
            let news: Vec<(u64, Value)> = {
                let state = self.state();
                if state.refused.is_some() {
                    return;
                }
                if since < state.forgotten {
                    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old resource version", "metadata": {}});
                    vec![(u64::MAX, json!({"type": "ERROR", "object": status}))]
                } else {
                    let newer = state.log.iter().filter(|(version, of, _)| *version > since && *of == path);
                    newer.map(|(version, _, event)| (*version, event.clone())).collect()
                }
            };
            for (version, event) in news {
                if lines.send(Ok(Frame::data(format!("{event}\n").into()))).await.is_err() || version == u64::MAX {
                    return;
                }
                since = version;
            }
            tokio::select! {
                _ = changed.changed() => {}
                () = lines.closed() => return,
            }
        }
    }
}

fn response(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    response
}
