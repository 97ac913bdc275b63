//! Owns the servers that an agent meets: real proxy-servers of any release, one in Rust that may be hostile, balancers and HTTP proxies.
//! Called by the tests and benches of the tunnel, and by `lab` for its proxy-server and its helpers.
//! Must never listen anywhere but in a network namespace that its caller made.

pub mod fake;
pub mod hostile;
pub mod http_proxy;
pub mod proxy_server;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncRead, AsyncReadExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use crate::lock;

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

/// Reads the head of an HTTP message, and nothing behind it that comes later.
pub(crate) async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Result<String> {
    let mut head = Vec::with_capacity(64);
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < 8 << 10, "a long head");
        ensure!(stream.read_buf(&mut head).await? > 0, "hung up");
    }
    Ok(String::from_utf8(head)?)
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

/// A TCP balancer: each connection goes to the next backend that answers. It does not look into what passes.
pub struct Balancer {
    backends: Arc<Mutex<Vec<SocketAddr>>>,
    /// Its connections.
    pub listener: Listener,
}

impl Balancer {
    /// Listens in front of these backends.
    pub async fn start(address: SocketAddr, backends: &[SocketAddr]) -> Result<Balancer> {
        let backends = Arc::new(Mutex::new(backends.to_vec()));
        let (shared, turn) = (Arc::clone(&backends), AtomicUsize::new(0));
        let listener = Listener::start(address, move |mut near| {
            let mut all = lock(&shared).clone();
            let first = turn.fetch_add(1, Ordering::Relaxed) % all.len().max(1);
            all.rotate_left(first);
            async move {
                for backend in all {
                    if let Ok(mut far) = TcpStream::connect(backend).await {
                        copy_bidirectional(&mut near, &mut far).await?;
                        break;
                    }
                }
                Ok(())
            }
        });
        Ok(Balancer { listener: listener.await?, backends })
    }

    /// From the next connection on, these are the backends.
    pub fn set(&self, backends: &[SocketAddr]) {
        *lock(&self.backends) = backends.to_vec();
    }
}
