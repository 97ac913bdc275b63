//! Owns the two ways to ask a running daemon: the admin socket (status) and the health port (healthz, readyz, metrics).
//! Called by `app` to serve, by the `status` command to ask.
//! Must never change anything: every request is a read.

use std::{
    future::Future,
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::report::{metrics, status::Status};

/// What the endpoints read.
pub trait Snapshots: Send + Sync + 'static {
    /// A fresh snapshot.
    fn status(&self) -> Status;
    /// What readiness is made of, beside answering at all, each with what is said where it is missing.
    const CHECKS: &'static [(&'static str, &'static str)];
    /// Whether the guard does its work. The checks that fail, by name.
    fn unready(&self) -> Vec<&'static str>;
    /// What whoever asks for details should know although it makes nothing unready, a line each.
    fn remarks(&self) -> Vec<String>;
    /// A check that is only made where it is asked for, with what there is to say: the name, whether it holds, in words.
    fn more(&self) -> Option<(&'static str, bool, String)> {
        None
    }
}

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no daemon answers on {0}")]
    Unreachable(PathBuf, #[source] io::Error),
    /// The answer is not one of ours.
    #[error("the daemon on {0} gave no usable answer: {1}")]
    Answer(PathBuf, String),
}

/// Binds the admin socket, for its owner only. A socket that nobody listens on any more is replaced.
pub fn bind_admin(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("another nodeguard is running: {} answers", path.display()),
            ));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the admin socket until `stop`.
pub async fn serve_admin<S: Snapshots>(
    listener: UnixListener,
    snapshots: Arc<S>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new().route("/status", get(status::<S>)).with_state(snapshots);
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

/// Serves the health port until `stop`.
pub async fn serve_health<S: Snapshots>(
    listener: TcpListener,
    snapshots: Arc<S>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(ready::<S>))
        .route("/ready", get(ready::<S>))
        .route("/metrics", get(text_metrics::<S>))
        .with_state(snapshots);
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

/// Serves upstream's admin port until `stop`: its one path that is not about Go sends a scraper on to the health port.
pub async fn serve_redirect(
    listener: TcpListener,
    health_port: u16,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let redirect = async move |headers: header::HeaderMap| match headers.get(header::HOST).and_then(bare_host) {
        Some(host) => {
            let location = [(header::LOCATION, format!("//{host}:{health_port}/metrics"))];
            (StatusCode::MOVED_PERMANENTLY, location).into_response()
        }
        None => StatusCode::BAD_REQUEST.into_response(),
    };
    axum::serve(listener, Router::new().route("/metrics", get(redirect))).with_graceful_shutdown(stop).await
}

/// A `Host` header without its port, if it is a name or an address.
fn bare_host(host: &header::HeaderValue) -> Option<String> {
    let host = host.to_str().ok()?;
    let port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let bare = match host.rsplit_once(':') {
        Some((bare, after)) if port(after) && (!bare.contains(':') || bare.ends_with(']')) => bare,
        Some(_) | None => host,
    };
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    (!bare.is_empty() && bare.bytes().all(letters)).then(|| bare.to_owned())
}

/// Asks a running daemon for its status.
pub async fn ask(path: &Path) -> Result<Status, AskError> {
    let stream = UnixStream::connect(path).await.map_err(|error| AskError::Unreachable(path.to_path_buf(), error))?;
    let failed = |error: String| AskError::Answer(path.to_path_buf(), error);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(error.to_string()))?;
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get("/status")
        .header(header::HOST, "nodeguard")
        .body(Empty::<bytes::Bytes>::new())
        .map_err(|error| failed(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| failed(error.to_string()))?;
    let body = response.into_body().collect().await.map_err(|error| failed(error.to_string()))?.to_bytes();
    connection.abort();
    serde_json::from_slice(&body).map_err(|error| failed(error.to_string()))
}

async fn status<S: Snapshots>(State(snapshots): State<Arc<S>>) -> impl IntoResponse {
    axum::Json(snapshots.status())
}

async fn text_metrics<S: Snapshots>(State(snapshots): State<Arc<S>>) -> impl IntoResponse {
    match metrics::encode(snapshots.status()) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// As upstream answers: `ok`, or with `?verbose` or a failure a line for each check; remarks behind them.
async fn ready<S: Snapshots>(State(snapshots): State<Arc<S>>, RawQuery(query): RawQuery) -> impl IntoResponse {
    let unready = snapshots.unready();
    let mut lines = "[+]ping ok\n".to_owned();
    for (check, missing) in S::CHECKS {
        if unready.contains(check) {
            lines.push_str(&format!("[-]{check} failed: {missing}\n"));
        } else {
            lines.push_str(&format!("[+]{check} ok\n"));
        }
    }
    for remark in snapshots.remarks() {
        lines.push_str(&format!("[!]{remark}\n"));
    }
    let mut more_holds = true;
    if let Some((check, holds, words)) = snapshots.more() {
        more_holds = holds;
        lines.push_str(&if holds {
            format!("[+]{check} ok: {words}\n")
        } else {
            format!("[-]{check} failed: {words}\n")
        });
    }
    let verbose = query.unwrap_or_default().split('&').any(|pair| pair.split('=').next() == Some("verbose"));
    match (unready.is_empty() && more_holds, verbose) {
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, lines),
        (true, false) => (StatusCode::OK, "ok".to_owned()),
        (true, true) => (StatusCode::OK, lines + "check passed\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_taken_without_its_port_or_not_at_all() {
        let bare = |text: &str| bare_host(&text.parse().unwrap());
        for (host, want) in
            [("127.0.0.1:8094", "127.0.0.1"), ("node-1", "node-1"), ("[::1]:8094", "[::1]"), ("[::1]", "[::1]")]
        {
            assert_eq!(bare(host).as_deref(), Some(want));
        }
        for host in ["", ":8094", "a/b", "a b", "evil\t", "a@b:1"] {
            assert_eq!(bare(host), None, "{host:?}");
        }
    }
}
