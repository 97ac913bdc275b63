//! Owns the tunnel: one stream to the proxy-server, made anew whenever it ends.
//! Called by `app`, which spawns [`Tunnel::run`].
//! Must never judge or dial: `session` hands each dial to `dial`.
//!
//! Reading order: `connect` (TLS, stream, headers; `batch` below HTTP/2) -> `session` (frames to dials and back) -> `frame` (the messages).

pub(crate) mod batch;
pub mod connect;
pub mod frame;
pub mod session;
pub mod tls;
pub mod traffic;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::{dial::Dialer, lock::lock};

/// How to reach one proxy-server, and as whom. Files are read anew for each connection.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// Its host, which its certificate must be for.
    pub host: String,
    /// Its agent port.
    pub port: u16,
    /// The only trusted CA certificates, PEM.
    pub ca: PathBuf,
    /// Client certificate chain and key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A service-account token.
    pub token: Option<PathBuf>,
    /// What is offered before `h2`.
    pub alpn: Vec<String>,
    /// The id of this agent; each stream adds a number.
    pub agent_id: String,
    /// What the control plane may dial this agent by, as a URL query.
    pub identifiers: String,
    /// First and longest wait between attempts.
    pub backoff: (Duration, Duration),
    /// How often an idle stream is probed.
    pub keepalive: Duration,
}

/// What `status` says about the stream.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamState {
    /// `host:port`.
    pub server: String,
    /// What the server calls itself.
    pub server_id: Option<String>,
    /// `connecting`, `connected`, `draining` or `waiting`.
    pub state: &'static str,
    /// RFC 3339: since when.
    pub since: String,
    /// Version and key exchange.
    pub tls: Option<String>,
    /// Why the last attempt or stream ended.
    pub last_error: Option<String>,
}

/// The tunnel.
pub struct Tunnel {
    config: TunnelConfig,
    dialer: Arc<Dialer>,
    state: Mutex<StreamState>,
}

impl Tunnel {
    /// A tunnel that is not connected yet.
    pub fn new(config: TunnelConfig, dialer: Arc<Dialer>) -> Arc<Tunnel> {
        let server = format!("{}:{}", config.host, config.port);
        let state = StreamState { server, state: "connecting", since: now(), ..StreamState::default() };
        Arc::new(Tunnel { config, dialer, state: Mutex::new(state) })
    }

    /// Whether a stream is up.
    pub fn connected(&self) -> bool {
        self.state().state == "connected"
    }

    /// The state of the stream.
    pub fn state(&self) -> StreamState {
        lock(&self.state).clone()
    }

    /// Holds the tunnel until `stop`, when what is on its way to the server is still sent. After `drain` the server is asked for no more
    /// dials, and a stream that ends is not made anew.
    pub async fn run(&self, drain: CancellationToken, stop: CancellationToken) {
        let server = format!("{}:{}", self.config.host, self.config.port);
        let (first, longest) = self.config.backoff;
        let builder = ExponentialBuilder::default()
            .with_min_delay(first)
            .with_max_delay(longest)
            .with_factor(1.5)
            .with_jitter()
            .without_max_times();
        let mut waits = builder.build();
        for number in 0u64.. {
            if drain.is_cancelled() {
                return stop.cancelled().await;
            }
            if stop.is_cancelled() {
                return;
            }
            self.set(|state| state.state = "connecting");
            let connected = tokio::select! {
                connected = connect::connect(&self.config, number) => connected,
                () = stop.cancelled() => return,
            };
            let error = match connected {
                Ok(stream) => {
                    waits = builder.build();
                    tracing::info!(
                        server,
                        server_id = stream.server_id,
                        server_count = stream.server_count,
                        tls = stream.tls,
                        "tunnel connected"
                    );
                    self.set(|state| {
                        state.state = "connected";
                        state.server_id = Some(stream.server_id.clone());
                        state.tls = Some(stream.tls.clone());
                        state.last_error = None;
                    });
                    let ended = session::run(stream, Arc::clone(&self.dialer), &drain, &stop).await;
                    if stop.is_cancelled() {
                        return;
                    }
                    tracing::warn!(server, reason = %ended, "tunnel lost");
                    format!("the stream ended: {ended}")
                }
                Err(error) => {
                    let text = error.to_string();
                    tracing::error!(
                        server,
                        check = error.check(),
                        error = text,
                        "no tunnel: the control plane cannot reach this node through this server"
                    );
                    text
                }
            };
            self.set(|state| {
                state.state = "waiting";
                state.last_error = Some(error);
                state.server_id = None;
                state.tls = None;
            });
            tokio::select! {
                () = tokio::time::sleep(waits.next().unwrap_or(longest)) => {}
                () = drain.cancelled() => {}
                () = stop.cancelled() => return,
            }
        }
    }

    fn set(&self, change: impl FnOnce(&mut StreamState)) {
        let mut state = lock(&self.state);
        change(&mut state);
        state.since = now();
    }
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}
