//! Owns Services and EndpointSlices as an API server has them: lists, and watches that go on.
//! Called by the fake API server, which serves them; tests change the objects, and how they are served.
//! Must never forget a change that a watch has not seen, unless it is told to: then it says so, as the real one does (410).

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

/// A kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Service,
    EndpointSlice,
}

/// The objects.
pub struct Objects {
    state: Mutex<Stored>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Stored {
    version: u64,
    /// Changes up to this version are forgotten.
    forgotten: u64,
    all: BTreeMap<(Kind, String), Value>,
    log: Vec<(u64, Kind, Value)>,
    /// The code that answers everything.
    refused: Option<u16>,
    lists: usize,
}

impl Default for Objects {
    fn default() -> Objects {
        Objects { state: Mutex::default(), changed: watch::channel(0).0 }
    }
}

/// The routes of these objects.
pub(super) fn router(objects: Arc<Objects>) -> Router {
    let serve =
        |kind| get(move |State(objects): State<Arc<Objects>>, Query(query)| async move { objects.serve(kind, query) });
    Router::new()
        .route("/api/v1/services", serve(Kind::Service))
        .route("/apis/discovery.k8s.io/v1/endpointslices", serve(Kind::EndpointSlice))
        .with_state(objects)
}

/// A failure as Kubernetes writes it.
fn failure(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message,
        "details": {}, "metadata": {},
    })
}

impl Objects {
    fn state(&self) -> MutexGuard<'_, Stored> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, kind: Kind, name: &str, object: Option<Value>) {
        let mut state = self.state();
        state.version += 1;
        let (version, key) = (state.version, (kind, name.to_owned()));
        let event = match object {
            Some(mut object) => {
                object["metadata"]["resourceVersion"] = version.to_string().into();
                let before = state.all.insert(key, object.clone());
                json!({"type": if before.is_some() { "MODIFIED" } else { "ADDED" }, "object": object})
            }
            None => json!({"type": "DELETED", "object": state.all.remove(&key)}),
        };
        state.log.push((version, kind, event));
        drop(state);
        self.changed.send_replace(version);
    }

    /// Creates or changes a Service of the namespace `default`: its ClusterIP and its port.
    pub fn service(&self, name: &str, address: &str, port: u16) {
        let object = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
            "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"name": "https", "port": port, "protocol": "TCP"}]},
        });
        self.change(Kind::Service, name, Some(object));
    }

    /// Deletes a Service.
    pub fn no_service(&self, name: &str) {
        self.change(Kind::Service, name, None);
    }

    /// Replaces the endpoints of a Service: address, node, whether it is ready; all at one port.
    pub fn endpoints(&self, service: &str, port: u16, all: &[(&str, &str, bool)]) {
        let endpoint = |(address, node, ready): &(&str, &str, bool)| json!({"addresses": [address], "nodeName": node, "conditions": {"ready": ready}});
        let name = format!("{service}-x");
        let object = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
            "endpoints": all.iter().map(endpoint).collect::<Vec<_>>(),
        });
        self.change(Kind::EndpointSlice, &name, Some(object));
    }

    /// From now on everything is answered with this code, and watches end; `None` serves again.
    pub fn refuse(&self, code: Option<u16>) {
        self.state().refused = code;
        self.changed.send_modify(|_| {});
    }

    /// Forgets the changes so far: who has not seen them has to list again.
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

    fn serve(self: Arc<Self>, kind: Kind, query: HashMap<String, String>) -> Response {
        let (version, list) = match kind {
            Kind::Service => ("v1", "ServiceList"),
            Kind::EndpointSlice => ("discovery.k8s.io/v1", "EndpointSliceList"),
        };
        let mut state = self.state();
        if let Some(code) = state.refused {
            let reason = if code == 403 { "Forbidden" } else { "ServiceUnavailable" };
            let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let said = failure(code.as_u16(), reason, &format!("{list} refused in the lab"));
            return (code, Json(said)).into_response();
        }
        if query.get("watch").is_some_and(|watch| watch == "true") {
            let since = query.get("resourceVersion").and_then(|since| since.parse().ok()).unwrap_or(0);
            drop(state);
            let (lines, body) = mpsc::channel(16);
            tokio::spawn(self.watch(kind, since, lines));
            let body = Body::from_stream(ReceiverStream::new(body));
            return ([(CONTENT_TYPE, "application/json")], body).into_response();
        }
        state.lists += 1;
        let items: Vec<&Value> =
            state.all.iter().filter(|((of, _), _)| *of == kind).map(|(_, object)| object).collect();
        let metadata = json!({"resourceVersion": state.version.to_string()});
        Json(json!({"kind": list, "apiVersion": version, "metadata": metadata, "items": items})).into_response()
    }

    /// Sends every change since a version, one a line, until objects are refused or nobody listens.
    async fn watch(self: Arc<Self>, kind: Kind, mut since: u64, lines: mpsc::Sender<Result<String, Infallible>>) {
        let mut changed = self.changed.subscribe();
        loop {
            let (expired, news) = {
                let state = self.state();
                if state.refused.is_some() {
                    return;
                }
                let newer = state.log.iter().filter(|(version, of, _)| *version > since && *of == kind);
                let news: Vec<(u64, Value)> = newer.map(|(version, _, event)| (*version, event.clone())).collect();
                (since < state.forgotten, news)
            };
            if expired {
                let status = failure(410, "Expired", "too old resource version");
                let event = json!({"type": "ERROR", "object": status});
                let _ = lines.send(Ok(format!("{event}\n"))).await;
                return;
            }
            for (version, event) in news {
                if lines.send(Ok(format!("{event}\n"))).await.is_err() {
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
