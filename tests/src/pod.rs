//! Owns what a webhook's and an aggregated API's pod runs: an HTTPS server that answers both, and counts what it was asked.
//! Called as the entry point of a pod's image in the cluster lab: ADDRESS CERTIFICATE KEY.
//! Must never end by itself.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use anyhow::{Result, bail};
use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use lab::certs::Tls;
use serde_json::{Value, json};

/// The group and version that the aggregated API serves.
const VERSION: &str = "lab.example.com/v1";

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [address, certificate, key] = &words[..] else { bail!("usage: ADDRESS CERTIFICATE KEY") };
    let router = Router::new()
        .route("/validate", post(validate))
        .route("/apis/lab.example.com/v1", get(resources))
        .route("/apis/lab.example.com/v1/reviews", get(reviews))
        .fallback(async || (StatusCode::NOT_FOUND, Json(json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound"}))))
        .with_state(Arc::<AtomicUsize>::default());
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let _listener = Tls::http(certificate.into(), key.into()).serve(address.parse()?, router).await?;
        std::future::pending().await
    })
}

async fn resources() -> Json<Value> {
    Json(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": VERSION, "resources": [
        {"name": "reviews", "singularName": "review", "namespaced": false, "kind": "ReviewCount", "verbs": ["get", "list"]}]}))
}

/// How often the webhook was asked.
async fn reviews(State(asked): State<Arc<AtomicUsize>>) -> Json<Value> {
    let count = asked.load(Ordering::Relaxed);
    Json(json!({"kind": "ReviewCountList", "apiVersion": VERSION, "metadata": {}, "items": [], "count": count}))
}

/// Admits everything but what says `deny: "yes"` in its data.
async fn validate(State(asked): State<Arc<AtomicUsize>>, Json(review): Json<Value>) -> Json<Value> {
    asked.fetch_add(1, Ordering::Relaxed);
    let request = &review["request"];
    let denied = request["object"]["data"]["deny"] == "yes";
    let mut response = json!({"uid": request["uid"], "allowed": !denied});
    if denied {
        response["status"] = json!({"code": 403, "message": "the webhook in the pod says no"});
    }
    Json(json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": response}))
}
