//! Owns bringing an edit into force: the kernel first, then the dials, then the open connections.
//! Called by `run` for each edit, and by `hold` for what came in while something was mended.
//! Must never take the last good policy away for one that is rejected or that the kernel refuses.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use guard_policy::load::Edit;

use crate::{
    daemon::state::Guard,
    kernel::{
        cgroups::follow::Follower,
        cut::{pass, pass::Pass},
        tables::apply::InForce,
    },
    sys::lock::lock,
};

/// How many cut connections are named in the log; the number says the rest.
const CUTS_LOGGED: usize = 20;

/// Brings an edit into force: the kernel first, then the dials. A rejected or failed one changes nothing.
pub(crate) async fn take_edit(guard: &Arc<Guard>, edit: Edit) -> anyhow::Result<()> {
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
    tokio::task::spawn_blocking(move || hold_edge(&holder));
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
pub(crate) async fn follow(guard: Arc<Guard>) {
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
    let pass = match pass::pass(&image, &guard.cgroup) {
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

/// Holds the edge tier on the interfaces that the ruleset in force names; what had to be mended.
pub(crate) fn hold_edge(guard: &Guard) -> Vec<String> {
    // Where no ruleset of this daemon is in force, what is pinned stays as it is.
    let Some((ruleset, _)) = lock(&guard.apply).followed() else { return Vec::new() };
    let tier = lock(&guard.programs).hold_edge(&ruleset.tables.edge);
    guard.edge.store(std::sync::Arc::new(tier.links));
    tier.mended
}
