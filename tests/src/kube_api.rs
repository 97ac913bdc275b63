//! Owns a stand-in for the API server: the questions that a tunnel and its guard ask it, over HTTPS.
//! Called by tests of tokens (the real proxy-server asks about each) of server leases (the agent counts them), and of Services (the guard watches them).
//! Must never answer a question that it was not told the answer to.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_rustls::TlsAcceptor;

use crate::{
    certs::Certs,
    kube_objects::{Body, Objects},
};

/// Who the proxy-server lets in.
pub const ACCOUNT: &str = "system:serviceaccount:kube-system:konnectivity-agent";
/// What a kubeconfig of this API proves itself with.
const TOKEN: &str = "an-api-token";

/// What it says.
#[derive(Default)]
struct State {
    /// The one token that is good.
    token: String,
    /// Every token that was asked about, and whether it was good.
    asked: Vec<(String, bool)>,
    /// The leases, or the status of a refusal.
    leases: Option<Vec<Value>>,
    listed: usize,
}

/// A running API.
pub struct KubeApi {
    state: Arc<Mutex<State>>,
    /// Services and EndpointSlices.
    pub objects: Arc<Objects>,
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for KubeApi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl KubeApi {
    /// Listens with the lab's server certificate.
    pub async fn start(address: SocketAddr, certs: &Certs) -> Result<KubeApi> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_file(certs.path("server.crt"))?],
                PrivateKeyDer::from_pem_file(certs.path("server.key"))?,
            )?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let (tls, listener) = (TlsAcceptor::from(Arc::new(config)), TcpListener::bind(address).await?);
        let state: Arc<Mutex<State>> = Arc::default();
        let objects: Arc<Objects> = Arc::default();
        let (shared, told) = (Arc::clone(&state), Arc::clone(&objects));
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (tls, state, objects) = (tls.clone(), Arc::clone(&shared), Arc::clone(&told));
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(request, Arc::clone(&state), Arc::clone(&objects)));
                    let stream = TokioIo::new(tls.accept(tcp).await?);
                    hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await?;
                    anyhow::Ok(())
                });
            }
        });
        Ok(KubeApi { state, objects, address, task })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on this token is good, and no other.
    pub fn accept(&self, token: &str) {
        token.clone_into(&mut self.state().token);
    }

    /// Every token that was asked about, and whether it was good.
    pub fn asked(&self) -> Vec<(String, bool)> {
        self.state().asked.clone()
    }

    /// From now on there are so many leases in force, and one that is over; `None` refuses the question.
    pub fn leases(&self, in_force: Option<usize>) {
        let lease =
            |renewed: &str| json!({"spec": {"holderIdentity": "s", "leaseDurationSeconds": 30, "renewTime": renewed}});
        let all = |count: usize| {
            let mut all: Vec<Value> = (0..count).map(|_| lease("2999-01-01T00:00:00.000000Z")).collect();
            all.push(lease("2020-01-01T00:00:00.000000Z"));
            all
        };
        self.state().leases = in_force.map(all);
    }

    /// How often leases were listed.
    pub fn listed(&self) -> usize {
        self.state().listed
    }

    /// Writes a kubeconfig for it.
    pub fn kubeconfig(&self, certs: &Certs, directory: &Path) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": format!("https://{}", self.address), "certificate-authority": certs.path("ca.crt")}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "users": [{"name": "lab", "user": {"token": TOKEN}}],
        });
        let path = directory.join("kubeconfig");
        std::fs::write(&path, config.to_string()).context("kubeconfig")?;
        Ok(path)
    }
}

async fn answer(request: Request<Incoming>, state: Arc<Mutex<State>>, objects: Arc<Objects>) -> Result<Response<Body>> {
    let authorized = request.headers().get("authorization").is_some_and(|value| value == &format!("Bearer {TOKEN}"));
    let (parts, body) = request.into_parts();
    if authorized && let Some(told) = objects.answer(parts.uri.path(), parts.uri.query().unwrap_or_default()) {
        return Ok(told);
    }
    let body: Value = serde_json::from_slice(&body.collect().await?.to_bytes()).unwrap_or_default();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let refusal = |code: u16, reason: &str| {
        (
            code,
            json!({"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason, "message": format!("{reason} in the lab")}),
        )
    };
    let (code, said) = match (parts.method, parts.uri.path()) {
        _ if !authorized => refusal(401, "Unauthorized"),
        (Method::GET, "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases")
            if parts.uri.query().is_some_and(|query| query.contains("labelSelector=k8s-app%3Dkonnectivity-server")) =>
        {
            state.listed += 1;
            match &state.leases {
                Some(leases) => {
                    (200, json!({"kind": "LeaseList", "apiVersion": "coordination.k8s.io/v1", "items": leases}))
                }
                None => refusal(403, "Forbidden"),
            }
        }
        (Method::POST, "/apis/authentication.k8s.io/v1/tokenreviews") => {
            let token = body.pointer("/spec/token").and_then(Value::as_str).unwrap_or_default().to_owned();
            let good = token == state.token;
            state.asked.push((token, good));
            let status = json!({"authenticated": good, "user": {"username": if good { ACCOUNT } else { "" }}});
            (201, json!({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status}))
        }
        _ => refusal(404, "NotFound"),
    };
    let mut response = Response::new(Full::new(Bytes::from(said.to_string())).boxed());
    *response.status_mut() = StatusCode::from_u16(code)?;
    response.headers_mut().insert("content-type", "application/json".parse()?);
    Ok(response)
}
