//! Owns the servers that an agent meets: real proxy-servers of any release, one in Rust that may be hostile, balancers and HTTP proxies.
//! Called by the tests and benches of the tunnel, and by `lab` for its proxy-server.
//! Must never listen anywhere but in a network namespace that its caller made.

pub mod agent;
pub mod balancer;
pub mod fake;
pub mod hostile;
pub mod http_proxy;
pub mod proxy_server;
pub mod tls;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// Polls until a condition holds; returns how long that took.
pub async fn eventually(
    what: &str,
    patience: Duration,
    mut holds: impl AsyncFnMut() -> Result<bool>,
) -> Result<Duration> {
    let started = Instant::now();
    while !holds().await? {
        ensure!(started.elapsed() < patience, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(started.elapsed())
}

/// A TCP listener with one task for each connection. Dropping it ends the listener and all connections.
pub struct Listener {
    cut: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    /// Listens at an address. An error ends only the connection it belongs to.
    pub async fn start<Served: Future<Output = Result<()>> + Send + 'static>(
        address: SocketAddr,
        serve: impl Fn(TcpStream) -> Served + Send + 'static,
    ) -> Result<Listener> {
        let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
        let (cut, cuts) = watch::channel(());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (served, mut cuts) = (serve(stream), cuts.clone());
                cuts.mark_unchanged();
                connections.spawn(async move {
                    tokio::select! {
                        _ = served => {}
                        _ = cuts.changed() => {}
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Listener { cut, task })
    }

    /// Ends every connection, and goes on listening.
    pub fn cut(&self) {
        self.cut.send_replace(());
    }
}
