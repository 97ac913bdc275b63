//! Owns what a running daemon serves of itself: the admin socket (status) and the health port (healthz, readyz, metrics).
//! Called by the daemon.
//! Must never change anything: every request is a read.

use std::{future::Future, io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::{TcpListener, UnixListener};

use crate::report::{metrics, readiness::Readiness, status::Status};

/// What the endpoints serve.
pub trait Served: Send + Sync + 'static {
    /// The status now.
    fn status(&self) -> Status;
    /// Whether the guard does its work now.
    fn readiness(&self) -> Readiness;
}

/// Binds the admin socket for its owner only. A socket file that nobody listens on is replaced.
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
pub async fn serve_admin<S: Served>(
    listener: UnixListener,
    served: Arc<S>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new().route("/status", get(status::<S>)).with_state(served);
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

/// Serves the health port until `stop`.
pub async fn serve_health<S: Served>(
    listener: TcpListener,
    served: Arc<S>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(ready::<S>))
        .route("/ready", get(ready::<S>))
        .route("/metrics", get(text_metrics::<S>))
        .with_state(served);
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

/// Serves upstream's admin port until `stop`: its one path that is not about Go redirects to the health port.
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

async fn status<S: Served>(State(served): State<Arc<S>>) -> impl IntoResponse {
    axum::Json(served.status())
}

async fn text_metrics<S: Served>(State(served): State<Arc<S>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::encode(&served.status()))
}

/// Answers as upstream does: `ok`, or all lines with `?verbose` or if a check fails.
async fn ready<S: Served>(State(served): State<Arc<S>>, RawQuery(query): RawQuery) -> impl IntoResponse {
    let readiness = served.readiness();
    let verbose = query.unwrap_or_default().split('&').any(|pair| pair.split('=').next() == Some("verbose"));
    match (readiness.is_ready(), verbose) {
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, readiness.lines()),
        (true, false) => (StatusCode::OK, "ok".to_owned()),
        (true, true) => (StatusCode::OK, readiness.lines() + "check passed\n"),
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
