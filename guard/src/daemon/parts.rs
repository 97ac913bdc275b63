//! Owns what both daemons have in common: the tunnel half, the long-lived tasks, the wait for edits and signals, and the end.
//! Called by `run` and `agent`, which add what only they have.
//! Must never go on without one of its tasks: a daemon that does half of its work looks healthy.

use std::{future::Future, io, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use guard_policy::policy_file::Edit;
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cli::config::TunnelHalfConfig,
    cluster::services::watch,
    daemon::drain::drain,
    dial::{audit::recorder::Audit, connections::Connections, serve::Dialer},
    kernel::pinholes::Pinholes,
    report::admin::{self, Served},
    tunnel::{advertise, handle::Tunnel, identifiers::Identifiers},
};

/// How long the tunnel may take to send what the dials wrote last.
const GOODBYE: Duration = Duration::from_secs(8);

/// The name of the one task that is waited for at the end.
const TUNNEL: &str = "tunnel";

/// The tunnel half: the dials, and the tunnel that they come through.
pub(crate) struct TunnelHalf {
    pub(crate) connections: Arc<Connections>,
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) tunnel: Arc<Tunnel>,
    audit: Arc<Audit>,
    /// The identifiers that pods' addresses are added to; `None` if pods are not advertised.
    advertised: Option<Identifiers>,
    drain_timeout: Duration,
}

impl TunnelHalf {
    /// Builds it, not connected yet. Without a published ruleset it refuses every dial.
    pub(crate) fn new(config: TunnelHalfConfig, pinholes: Arc<dyn Pinholes>) -> io::Result<TunnelHalf> {
        let TunnelHalfConfig { node, tunnel, advertise_pods, audit, limits, services, drain_timeout } = config;
        let advertised = advertise_pods.then(|| tunnel.identifiers.clone());
        let connections = Connections::new(node);
        let audit = Audit::start(audit)?;
        let dialer = Dialer::new(Arc::clone(&connections), pinholes, Arc::clone(&audit), limits, services);
        let tunnel = Tunnel::new(tunnel, Arc::clone(&dialer));
        Ok(TunnelHalf { connections, dialer, tunnel, audit, advertised, drain_timeout })
    }
}

/// Where the daemon answers questions, bound before anything else starts.
pub(crate) struct Listeners {
    admin: Option<(PathBuf, UnixListener)>,
    health: Option<TcpListener>,
}

impl Listeners {
    /// Binds the admin socket and the health port.
    pub(crate) async fn bind(
        admin_socket: Option<PathBuf>,
        health: Option<std::net::SocketAddr>,
    ) -> anyhow::Result<Listeners> {
        let admin = admin_socket.map(|path| {
            let listener = admin::bind_admin(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
            anyhow::Ok((path, listener))
        });
        let health = match health {
            Some(address) => Some(
                TcpListener::bind(address)
                    .await
                    .with_context(|| format!("cannot listen on {address} (--health-server-port)"))?,
            ),
            None => None,
        };
        Ok(Listeners { admin: admin.transpose()?, health })
    }
}

/// The long-lived tasks of a daemon, each with a name for the log.
pub(crate) struct Parts {
    tasks: JoinSet<&'static str>,
    draining: CancellationToken,
    stop: CancellationToken,
    /// Removed at the end.
    admin_socket: Option<PathBuf>,
}

impl Parts {
    /// Starts the tasks of the tunnel half, and answers on the listeners.
    pub(crate) fn start<S: Served>(half: &TunnelHalf, listeners: Listeners, state: &Arc<S>) -> Parts {
        let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
        let mut parts = Parts { tasks: JoinSet::new(), draining, stop, admin_socket: None };
        if let Some(own) = half.advertised.clone() {
            parts.spawn(
                "watch on pods",
                advertise::follow(Arc::clone(&half.connections), Arc::clone(&half.tunnel), own),
            );
        }
        let dialer = Arc::clone(&half.dialer);
        parts.spawn("watch on Services", async move { watch::follow(&dialer.services).await });
        parts.spawn_fallible("audit file", Arc::clone(&half.audit).follow_hangups());
        let (tunnel, draining, stop) = (Arc::clone(&half.tunnel), parts.draining.clone(), parts.stop.clone());
        parts.spawn(TUNNEL, async move { tunnel.run(draining, stop).await });
        if let Some((path, listener)) = listeners.admin {
            parts.spawn_fallible("admin socket", admin::serve_admin(listener, Arc::clone(state), parts.stopped()));
            parts.admin_socket = Some(path);
        }
        if let Some(listener) = listeners.health {
            parts.spawn_fallible("health port", admin::serve_health(listener, Arc::clone(state), parts.stopped()));
        }
        parts
    }

    /// Adds a task. The daemon ends with an error if the task ends before the daemon does.
    pub(crate) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(async move {
            task.await;
            name
        });
    }

    /// The same for a task that can fail, which is logged.
    pub(crate) fn spawn_fallible(
        &mut self,
        name: &'static str,
        task: impl Future<Output = io::Result<()>> + Send + 'static,
    ) {
        self.spawn(name, async move {
            if let Err(error) = task.await {
                tracing::error!(part = name, %error, "a part of the daemon failed");
            }
        });
    }

    /// Resolves once the daemon stops.
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        self.stop.clone().cancelled_owned()
    }

    /// Takes edits until SIGTERM or SIGINT, then drains and ends every task. Returns whether every dial ended by itself.
    pub(crate) async fn run(
        mut self,
        half: &TunnelHalf,
        mut edits: mpsc::Receiver<Edit>,
        mut take: impl AsyncFnMut(Edit) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        loop {
            tokio::select! {
                () = either(&mut terminate, &mut interrupt) => break,
                Some(edit) = edits.recv() => take(edit).await?,
                // A part that ends early is a defect: report it, and let the supervisor start a new daemon.
                Some(part) = self.tasks.join_next() => {
                    anyhow::bail!("the {} ended unexpectedly", part.unwrap_or("crashed part"));
                }
            }
        }
        let hurry = either(&mut terminate, &mut interrupt);
        let clean = drain(&half.connections, &self.draining, half.drain_timeout, hurry).await;
        self.stop.cancel();
        // The tunnel still sends what the dials wrote last; the other parts have nothing to lose.
        let goodbye = async { while self.tasks.join_next().await.is_some_and(|part| !matches!(part, Ok(TUNNEL))) {} };
        let _ = timeout(GOODBYE, goodbye).await;
        self.tasks.shutdown().await;
        half.audit.finish();
        if let Some(path) = self.admin_socket {
            drop(std::fs::remove_file(path));
        }
        Ok(clean)
    }
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
