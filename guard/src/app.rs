//! Owns the daemon: builds its parts from top to bottom, spawns them, waits, drains.
//! Called by `main` for `run`.
//! Must never attach a program before a ruleset is in force, and never end with the kernel half detached.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use arc_swap::ArcSwap;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin, advertise,
    audit::Audit,
    config::Config,
    connections::Connections,
    dial::Dialer,
    drain::drain,
    edge,
    hold::hold,
    kernel::{
        apply::{Apply, InForce},
        established::{self, Pass},
        events::{self, DenialLog},
        follow::Follower,
        load::{self, Loaded},
        pinholes::KernelPinholes,
        usage::Usage,
    },
    lock::lock,
    policy::watch::{self, Edit},
    snapshot::{Current, Guard},
    tunnel::Tunnel,
};

/// How many cut connections are named in the log; the number says the rest.
const CUTS_LOGGED: usize = 20;

/// How long the tunnel may take to end.
pub(crate) const GOODBYE: Duration = Duration::from_secs(8);

/// Runs until SIGTERM or SIGINT, then drains.
pub async fn run(config: Config, colour: bool) -> anyhow::Result<()> {
    let Config {
        policy,
        location,
        program_stats,
        admin_socket,
        health,
        drain_timeout,
        node,
        tunnel,
        advertise_pods,
        audit,
        limits,
        services,
    } = config;
    let own_identifiers = tunnel.identifiers.clone();
    let admin_listener =
        admin::bind_admin(&admin_socket).with_context(|| format!("cannot listen on {}", admin_socket.display()))?;
    let health_listener = match health {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address} (--health-server-port)"))?,
        ),
        None => None,
    };

    // Policy and kernel: what is pinned is adopted, the ruleset comes into force, and only then is anything attached.
    let first = watch::load(&policy, &node);
    let Loaded { maps, health: lost, events, cookies, mut programs } = load::open(&location)?;
    let mut apply = Apply::new(maps)?.below(&location.cgroup);
    let mut current = Current::default();
    match &first {
        Ok(loaded) => {
            apply.apply(&loaded.ruleset)?;
            current.took(loaded);
        }
        Err(rejected) if apply.in_force().epoch == 0 => {
            anyhow::bail!("the policy is rejected, and there is none in force:\n{}", rejected.render(colour))
        }
        Err(rejected) => {
            let epoch = apply.in_force().epoch;
            tracing::error!(
                epoch,
                "the policy is rejected; what was in force before stays so in the kernel, and no dial is admitted:\n{}",
                rejected.render(false)
            );
            current.rejected(rejected);
        }
    }
    let predecessors = programs.attach()?;
    if let Some(ruleset) = &current.ruleset {
        programs.take_edge(&predecessors, &ruleset.tables.edge);
    }
    for before in predecessors {
        apply.carry(&before.counts()?)?;
        before.remove()?;
    }
    let in_force = apply.in_force();
    tracing::info!(policy = %policy.display(), epoch = in_force.epoch, cgroup = %location.cgroup.display(), "in force");

    // The tunnel half.
    let connections = Connections::new(node.clone());
    connections.publish(current.ruleset.clone());
    let audit = Audit::start(audit)?;
    let dialer = Dialer::new(
        Arc::clone(&connections),
        Arc::new(KernelPinholes::new(cookies)?),
        Arc::clone(&audit),
        limits,
        services,
    );
    let tunnel = Tunnel::new(tunnel, Arc::clone(&dialer));
    let guard = Arc::new(Guard {
        policy: policy.clone(),
        bpffs: location.bpffs.clone(),
        cgroup: location.cgroup.clone(),
        cut: AtomicU64::new(0),
        uncut: AtomicBool::new(false),
        blind: AtomicBool::new(false),
        netns_helper: programs.netns_helper,
        programs: Mutex::new(programs),
        mended: AtomicU64::new(0),
        current: Mutex::new(current),
        apply: Mutex::new(apply),
        lost,
        in_force: Arc::new(ArcSwap::from_pointee(in_force)),
        usage: Mutex::new(Usage::open(&location.bpffs, program_stats)?),
        edge: ArcSwap::default(),
        denials: Arc::new(DenialLog::default()),
        connections: Arc::clone(&connections),
        dialer,
        tunnel: Arc::clone(&tunnel),
    });

    edge::hold(&guard);
    // Connections from before the guard are judged like those from before an edit.
    let cutter = Arc::clone(&guard);
    tokio::task::spawn_blocking(move || cut(&cutter));

    let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
    let mut parts: JoinSet<&'static str> = JoinSet::new();
    let (edits_to, mut edits) = mpsc::channel(1);
    parts.spawn(named("policy watch", watch::watch(policy, node, first, edits_to)));
    parts.spawn(named(
        "denial events",
        log_error(events::drain(events, Arc::clone(&guard.in_force), Arc::clone(&guard.denials))),
    ));
    parts.spawn(named("hold on the kernel half", hold(Arc::clone(&guard))));
    parts.spawn(named("watch on cgroups", follow(Arc::clone(&guard))));
    if advertise_pods {
        let followed = advertise::follow(Arc::clone(&connections), Arc::clone(&guard.tunnel), own_identifiers);
        parts.spawn(named("watch on pods", followed));
    }
    let watched = Arc::clone(&guard);
    parts.spawn(named("watch on Services", async move { watched.dialer.services.watch().await }));
    parts.spawn(named("audit file", log_error(Arc::clone(&audit).follow_hangups())));
    let (drained, stopped) = (draining.clone(), stop.clone());
    parts.spawn(named("tunnel", async move { tunnel.run(drained, stopped).await }));
    parts.spawn(named(
        "admin socket",
        log_error(admin::serve_admin(admin_listener, Arc::clone(&guard), stop.clone().cancelled_owned())),
    ));
    if let Some(listener) = health_listener {
        parts.spawn(named(
            "health port",
            log_error(admin::serve_health(listener, Arc::clone(&guard), stop.clone().cancelled_owned())),
        ));
    }

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(edit) = edits.recv() => take_edit(&guard, edit).await?,
            Some(part) = parts.join_next() => {
                // A part that ends early is a defect: say so, and let the supervisor start the whole anew. The kernel half stays.
                anyhow::bail!("the {} ended unexpectedly; the kernel half stays in force", part.unwrap_or("crashed part"));
            }
        }
    }
    let again = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let clean = drain(&connections, &draining, drain_timeout, again).await;
    stop.cancel();
    // What the dials sent last is still on its way through the tunnel; the other parts have nothing to lose.
    let goodbye = async { while parts.join_next().await.is_some_and(|part| !matches!(part, Ok("tunnel"))) {} };
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    parts.shutdown().await;
    audit.finish();
    drop(std::fs::remove_file(&admin_socket));
    tracing::info!(clean, "ended; the kernel half stays in force (`nodeguard unpin` removes it)");
    Ok(())
}

/// Brings an edit into force: the kernel first, then the dials. A rejected or failed one changes nothing.
async fn take_edit(guard: &Arc<Guard>, edit: Edit) -> anyhow::Result<()> {
    let started = Instant::now();
    let loaded = match edit {
        Ok(loaded) => loaded,
        Err(rejected) => {
            tracing::error!(
                epoch = guard.in_force.load().epoch,
                "the edit is rejected; the last good policy stays in force:\n{}",
                rejected.render(false)
            );
            lock(&guard.current).rejected(&rejected);
            return Ok(());
        }
    };
    let (applier, ruleset) = (Arc::clone(guard), Arc::clone(&loaded.ruleset));
    let applied = tokio::task::spawn_blocking(move || lock(&applier.apply).apply(&ruleset)).await?;
    let in_force: InForce = match applied {
        Ok(in_force) => in_force,
        Err(error) => {
            let error = anyhow::Error::from(error);
            tracing::error!(
                error = format!("{error:#}"),
                "the edit could not be brought into the kernel; what was in force stays so"
            );
            lock(&guard.current).failed(format!("{error:#}"));
            return Ok(());
        }
    };
    let epoch = in_force.epoch;
    guard.in_force.store(Arc::new(in_force));
    let closed = guard.connections.publish(Some(Arc::clone(&loaded.ruleset)));
    if !loaded.warnings.is_empty() {
        tracing::warn!("the policy is taken, with warnings:\n{}", loaded.source.render(&loaded.warnings, false));
    }
    lock(&guard.current).took(&loaded);
    let cutter = Arc::clone(guard);
    tokio::task::spawn_blocking(move || cut(&cutter));
    let holder = Arc::clone(guard);
    tokio::task::spawn_blocking(move || edge::hold(&holder));
    tracing::info!(
        policy = loaded.ruleset.name,
        epoch,
        closed_dials = closed,
        milliseconds = started.elapsed().as_millis() as u64,
        "in force"
    );
    Ok(())
}

/// Keeps what the policy says of cgroups true while these come and go.
async fn follow(guard: Arc<Guard>) {
    let mut follower = Follower::start();
    loop {
        if let Some((ruleset, _)) = lock(&guard.apply).followed() {
            follower.watch(&guard.cgroup, &ruleset);
        }
        let applier = Arc::clone(&guard);
        let followed = tokio::task::spawn_blocking(move || lock(&applier.apply).follow()).await;
        if let Err(error) = followed.map_err(anyhow::Error::from).and_then(|followed| Ok(followed?)) {
            tracing::error!(
                error = format!("{error:#}"),
                "a cgroup that the policy names came or went and cannot be brought into the kernel; callers in it may be denied"
            );
        }
        follower.changed().await;
    }
}

/// Cuts the connections that were open before the ruleset in force and that it does not admit.
pub(crate) fn cut(guard: &Guard) {
    let Some(image) = lock(&guard.apply).image() else { return };
    let pass = match established::pass(&image, &guard.cgroup) {
        Ok(pass) => pass,
        Err(error) => {
            guard.uncut.store(true, Ordering::Relaxed);
            return tracing::error!(%error, "open connections cannot be judged: those that are no longer admitted go on");
        }
    };
    let Pass { namespaces, judged, cut, failed, blind } = pass;
    guard.uncut.store(failed > 0, Ordering::Relaxed);
    guard.blind.store(blind, Ordering::Relaxed);
    guard.cut.fetch_add(cut.len() as u64, Ordering::Relaxed);
    for (socket, reason) in cut.iter().take(CUTS_LOGGED) {
        tracing::warn!(source = %socket.remote, destination = %socket.local, reason = reason.name(), "connection cut: it is no longer admitted");
    }
    tracing::info!(namespaces, judged, cut = cut.len(), failed, "open connections judged");
}

pub(crate) async fn named(name: &'static str, part: impl Future<Output = ()>) -> &'static str {
    part.await;
    name
}

pub(crate) async fn log_error(part: impl Future<Output = std::io::Result<()>>) {
    if let Err(error) = part.await {
        tracing::error!(%error, "a part of the daemon failed");
    }
}
