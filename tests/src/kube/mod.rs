//! Owns a fake API server over HTTPS: reviews of tokens, leases of proxy-servers, and what `objects` has of Services.
//! Called by tests: the real proxy-server reviews tokens, the agent counts leases and watches Services.
//! Must never answer a question whose answer it was not given.

pub mod objects;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    extract::{RawQuery, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};

use self::objects::Objects;
use crate::{
    certs::Certs,
    servers::{Listener, tls::Tls},
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

fn lock(known: &Shared) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

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
        let router = Router::new()
            .route("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases", get(leases))
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
            .with_state(Arc::clone(&known))
            .merge(objects::router(Arc::clone(&objects)))
            .fallback(async || refusal(StatusCode::NOT_FOUND, "NotFound"))
            .layer(from_fn(authorized));
        let (certificate, key) = (certs.path("server.crt"), certs.path("server.key"));
        let listener = Tls::http(&certificate, &key).serve(address, router).await?;
        Ok(KubeApi { known, objects, address, _listener: listener })
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

/// A refusal as Kubernetes writes it.
fn refusal(code: StatusCode, reason: &str) -> Response {
    let message = format!("{reason} in the lab");
    let status =
        json!({"kind": "Status", "apiVersion": "v1", "code": code.as_u16(), "reason": reason, "message": message});
    (code, Json(status)).into_response()
}

async fn authorized(request: Request, next: Next) -> Response {
    let bearer = format!("Bearer {TOKEN}");
    if request.headers().get("authorization").is_some_and(|shown| *shown == bearer) {
        next.run(request).await
    } else {
        refusal(StatusCode::UNAUTHORIZED, "Unauthorized")
    }
}

async fn leases(State(known): State<Shared>, RawQuery(query): RawQuery) -> Response {
    if !query.is_some_and(|query| query.contains("labelSelector=k8s-app%3Dkonnectivity-server")) {
        return refusal(StatusCode::NOT_FOUND, "NotFound");
    }
    let mut known = lock(&known);
    known.listed += 1;
    match &known.leases {
        Some(leases) => {
            Json(json!({"kind": "LeaseList", "apiVersion": "coordination.k8s.io/v1", "items": leases})).into_response()
        }
        None => refusal(StatusCode::FORBIDDEN, "Forbidden"),
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
