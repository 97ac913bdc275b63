//! Owns asking a running daemon for its status over the admin socket.
//! Called by the `status` command.
//! Must never take anything but a whole status for an answer.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt, Empty};
use hyper::{StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::report::status::Status;

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no daemon answers on {0}")]
    Unreachable(PathBuf, #[source] io::Error),
    /// The connection failed.
    #[error("the daemon on {0} did not answer")]
    Http(PathBuf, #[source] hyper::Error),
    /// The daemon cannot answer.
    #[error("the daemon on {0} answered with {1}")]
    Refused(PathBuf, StatusCode),
    /// The answer is not a status of this version.
    #[error("the daemon on {0} sent a status that this version cannot read")]
    Body(PathBuf, #[source] serde_json::Error),
}

/// Asks a running daemon for its status.
pub async fn ask(path: &Path) -> Result<Status, AskError> {
    let stream = UnixStream::connect(path).await.map_err(|error| AskError::Unreachable(path.to_path_buf(), error))?;
    let failed = |error| AskError::Http(path.to_path_buf(), error);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let connection = tokio::spawn(connection);
    let mut request = hyper::Request::new(Empty::<bytes::Bytes>::new());
    *request.uri_mut() = hyper::Uri::from_static("/status");
    request.headers_mut().insert(header::HOST, header::HeaderValue::from_static("nodeguard"));
    let response = sender.send_request(request).await.map_err(failed)?;
    if response.status() != StatusCode::OK {
        return Err(AskError::Refused(path.to_path_buf(), response.status()));
    }
    let body = response.into_body().collect().await.map_err(failed)?.to_bytes();
    connection.abort();
    serde_json::from_slice(&body).map_err(|error| AskError::Body(path.to_path_buf(), error))
}
