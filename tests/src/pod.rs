//! Owns what a webhook's and an aggregated API's pod runs: an HTTPS server that answers both, and counts what it was asked.
//! Called as the entry point of a pod's image in the cluster lab: ADDRESS CERTIFICATE KEY.
//! Must never end by itself.

use std::{
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// The group and version that the aggregated API serves.
const GROUP: &str = "lab.example.com";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("error: {error:#}\n")));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<()> {
    let [address, certificate, key] = words else { anyhow::bail!("usage: ADDRESS CERTIFICATE KEY") };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = CertificateDer::pem_file_iter(Path::new(certificate))?.collect::<Result<Vec<_>, _>>()?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(Path::new(key))?)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (address, acceptor): (SocketAddr, _) = (address.parse()?, TlsAcceptor::from(Arc::new(config)));
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let asked: Arc<AtomicUsize> = Arc::default();
        loop {
            let (stream, _) = listener.accept().await?;
            let (acceptor, asked) = (acceptor.clone(), Arc::clone(&asked));
            tokio::spawn(async move {
                let stream = TokioIo::new(acceptor.accept(stream).await?);
                let service = service_fn(move |request| answer(request, Arc::clone(&asked)));
                hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await?;
                anyhow::Ok(())
            });
        }
    })
}

async fn answer(request: Request<Incoming>, asked: Arc<AtomicUsize>) -> Result<Response<Full<Bytes>>> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let version = format!("{GROUP}/v1");
    let (code, said) = match (parts.method, parts.uri.path()) {
        (Method::POST, "/validate") => {
            asked.fetch_add(1, Ordering::Relaxed);
            (200, review(&serde_json::from_slice(&body)?))
        }
        (Method::GET, "/apis/lab.example.com/v1") => (
            200,
            json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": [
                {"name": "reviews", "singularName": "review", "namespaced": false, "kind": "ReviewCount", "verbs": ["get", "list"]}]}),
        ),
        // How often the webhook was asked, through the API.
        (Method::GET, "/apis/lab.example.com/v1/reviews") => {
            let count = asked.load(Ordering::Relaxed);
            (
                200,
                json!({"kind": "ReviewCountList", "apiVersion": version, "metadata": {}, "items": [], "count": count}),
            )
        }
        _ => {
            (404, json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound"}))
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(said.to_string())));
    *response.status_mut() = StatusCode::from_u16(code)?;
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Lets everything pass but what says `deny: "yes"` in its data.
fn review(review: &Value) -> Value {
    let request = review.get("request").cloned().unwrap_or_default();
    let denied = request.pointer("/object/data/deny") == Some(&json!("yes"));
    let mut response = json!({"uid": request.get("uid"), "allowed": !denied});
    if denied && let Some(response) = response.as_object_mut() {
        response.insert("status".to_owned(), json!({"code": 403, "message": "the webhook in the pod says no"}));
    }
    json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": response})
}
