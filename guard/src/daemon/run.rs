//! Owns the daemon: builds its parts from top to bottom, spawns them, waits, drains.
//! Called by `main` for `run`.
//! Must never attach a program before a ruleset is in force, and never end with the kernel half detached.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use anyhow::Context;
use arc_swap::ArcSwap;
use guard_policy::load::load;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cli::config::Config,
    daemon::{
        drain::drain,
        edit::{cut, follow, hold_edge, take_edit},
        hold::hold,
        policy_watch as watch,
        state::{Current, Guard},
    },
    dial::{audit::entry::Audit, connections::Connections, serve::Dialer},
    kernel::{
        links::{load, load::Loaded},
        observe::{events, events::DenialLog, map_use::Usage},
        pinholes::KernelPinholes,
        tables::apply::Apply,
    },
    report::admin,
    tunnel::{advertise, handle::Tunnel},
};

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
    let first = load(&policy, &node);
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

    hold_edge(&guard);
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

pub(crate) async fn named(name: &'static str, part: impl Future<Output = ()>) -> &'static str {
    part.await;
    name
}

pub(crate) async fn log_error(part: impl Future<Output = std::io::Result<()>>) {
    if let Err(error) = part.await {
        tracing::error!(%error, "a part of the daemon failed");
    }
}
