//! Owns a fake API server over HTTPS: reviews of tokens, leases of proxy-servers, Services and their EndpointSlices.
//! Called by tests: the real proxy-server reviews tokens, the agent counts leases and watches Services.
//! Must never answer a question whose answer it was not given.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    body::Body,
    extract::{Query, RawQuery, Request, State},
    http::{StatusCode, header::CONTENT_TYPE},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    certs::{Certs, Tls},
    lock,
    servers::Listener,
};

/// The account of the tokens that are accepted.
pub const ACCOUNT: &str = "system:serviceaccount:kube-system:konnectivity-agent";
/// The bearer token of its kubeconfig.
const TOKEN: &str = "an-api-token";

/// What it knows.
#[derive(Default)]
struct Known {
    /// The one token that is good.
    token: String,
    /// Every token that was reviewed, and whether it was good.
    reviewed: Vec<(String, bool)>,
    /// The leases; `None` refuses to list them.
    leases: Option<Vec<Value>>,
    listed: usize,
}

type Shared = Arc<Mutex<Known>>;

/// A running API server.
pub struct KubeApi {
    known: Shared,
    /// Services and EndpointSlices.
    pub objects: Arc<Objects>,
    address: SocketAddr,
    _listener: Listener,
}

impl KubeApi {
    /// Listens with the lab's server certificate.
    pub async fn start(address: SocketAddr, certs: &Certs) -> Result<KubeApi> {
        let (known, objects): (Shared, Arc<Objects>) = Default::default();
        let of = |kind| {
            let objects = Arc::clone(&objects);
            get(move |Query(query)| async move { objects.serve(kind, query) })
        };
        let router = Router::new()
            .route("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases", get(leases))
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
            .route("/api/v1/services", of(Kind::Service))
            .route("/apis/discovery.k8s.io/v1/endpointslices", of(Kind::EndpointSlice))
            .with_state(Arc::clone(&known))
            .fallback(async || refusal(404, "NotFound"))
            .layer(from_fn(authorized));
        let _listener = Tls::server(certs).serve(address, router).await?;
        Ok(KubeApi { known, objects, address, _listener })
    }

    /// From now on this token is good, and no other.
    pub fn accept(&self, token: &str) {
        token.clone_into(&mut lock(&self.known).token);
    }

    /// Every token that was reviewed, and whether it was good.
    pub fn reviewed(&self) -> Vec<(String, bool)> {
        lock(&self.known).reviewed.clone()
    }

    /// From now on so many leases are in force, and one has expired; `None` refuses to list them.
    pub fn leases(&self, in_force: Option<usize>) {
        let lease =
            |renewed: &str| json!({"spec": {"holderIdentity": "s", "leaseDurationSeconds": 30, "renewTime": renewed}});
        lock(&self.known).leases = in_force.map(|count| {
            let mut leases = vec![lease("2999-01-01T00:00:00.000000Z"); count];
            leases.push(lease("2020-01-01T00:00:00.000000Z"));
            leases
        });
    }

    /// How often leases were listed.
    pub fn listed(&self) -> usize {
        lock(&self.known).listed
    }

    /// Writes a kubeconfig for it.
    pub fn kubeconfig(&self, certs: &Certs, directory: &Path) -> Result<PathBuf> {
        let path = directory.join("kubeconfig");
        kubeconfig(&path, self.address, &certs.path("ca.crt"), &json!({"token": TOKEN}))?;
        Ok(path)
    }
}

/// Writes a kubeconfig: the API server, its CA, and how the user proves who it is.
pub fn kubeconfig(path: &Path, server: SocketAddr, ca: &Path, user: &Value) -> Result<()> {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": format!("https://{server}"), "certificate-authority": ca}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        "users": [{"name": "lab", "user": user}],
    });
    std::fs::write(path, config.to_string()).with_context(|| path.display().to_string())
}

/// A failure as Kubernetes writes it.
fn failure(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message,
        "details": {}, "metadata": {},
    })
}

fn refusal(code: u16, reason: &str) -> Response {
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(failure(code, reason, "refused in the lab"))).into_response()
}

async fn authorized(request: Request, next: Next) -> Response {
    let bearer = format!("Bearer {TOKEN}");
    if request.headers().get("authorization").is_some_and(|shown| *shown == bearer) {
        next.run(request).await
    } else {
        refusal(401, "Unauthorized")
    }
}

async fn leases(State(known): State<Shared>, RawQuery(query): RawQuery) -> Response {
    if !query.is_some_and(|query| query.contains("labelSelector=k8s-app%3Dkonnectivity-server")) {
        return refusal(404, "NotFound");
    }
    let mut known = lock(&known);
    known.listed += 1;
    match &known.leases {
        Some(leases) => {
            Json(json!({"kind": "LeaseList", "apiVersion": "coordination.k8s.io/v1", "items": leases})).into_response()
        }
        None => refusal(403, "Forbidden"),
    }
}

async fn review(State(known): State<Shared>, Json(review): Json<Value>) -> Response {
    let token = review["spec"]["token"].as_str().unwrap_or_default().to_owned();
    let mut known = lock(&known);
    let good = token == known.token;
    known.reviewed.push((token, good));
    let status = json!({"authenticated": good, "user": {"username": if good { ACCOUNT } else { "" }}});
    let review = json!({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status});
    (StatusCode::CREATED, Json(review)).into_response()
}

/// A kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Service,
    EndpointSlice,
}

/// Services and EndpointSlices as an API server has them: lists, and watches that go on. A change that a watch has not seen is never forgotten,
/// unless a test says so: then the watch is told, as by the real one (410).
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

impl Objects {
    fn change(&self, kind: Kind, name: &str, object: Option<Value>) {
        let mut state = lock(&self.state);
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
        lock(&self.state).refused = code;
        self.changed.send_modify(|_| {});
    }

    /// Forgets the changes so far: who has not seen them has to list again.
    pub fn forget(&self) {
        let mut state = lock(&self.state);
        state.version += 1;
        state.forgotten = state.version;
        state.log.clear();
    }

    /// How often they were listed.
    pub fn lists(&self) -> usize {
        lock(&self.state).lists
    }

    fn serve(self: Arc<Self>, kind: Kind, query: HashMap<String, String>) -> Response {
        let (version, list) = match kind {
            Kind::Service => ("v1", "ServiceList"),
            Kind::EndpointSlice => ("discovery.k8s.io/v1", "EndpointSliceList"),
        };
        let mut state = lock(&self.state);
        if let Some(code) = state.refused {
            return refusal(code, if code == 403 { "Forbidden" } else { "ServiceUnavailable" });
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
                let state = lock(&self.state);
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
