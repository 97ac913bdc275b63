//! Owns the daemon: opens the kernel half, brings the ruleset into force, attaches, and starts the tunnel half.
//! Called by `main` for `run`.
//! Must never attach a program before a ruleset is in force, and never end with the kernel half detached.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64},
};

use anyhow::Context;
use arc_swap::ArcSwap;
use guard_policy::policy_file::load;
use tokio::sync::mpsc;

use crate::{
    cli::config::Config,
    daemon::{
        edit::{InForceAt, NothingInForce, cut, follow, hold_edge, take},
        hold::hold,
        parts::{Listeners, Parts, TunnelHalf},
        policy_watch as watch,
        state::{Current, Guard, misplaced},
    },
    kernel::{
        links::{programs, programs::KernelHalf},
        namespaces::NamespaceView,
        observe::{events, events::DenialLog, map_use::MapCounter},
        pinholes::KernelPinholes,
        tables::apply::Apply,
    },
    sys::place::Place,
};

/// Runs until SIGTERM or SIGINT, then drains.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let Config { policy, location, whole_node, program_stats, admin_socket, health, half } = config;
    let node = half.node.clone();
    let listeners = Listeners::bind(Some(admin_socket), health).await?;

    // Policy and kernel: what is pinned is adopted, the ruleset comes into force, and only then is anything attached.
    let first = load(&policy, &node);
    let KernelHalf { maps, health: lost, events, cookies, mut programs } = programs::open(&location)?;
    let mut apply = Apply::new(maps)?.below(&location.cgroup);
    let mut view = NamespaceView::default();
    apply.see(view.look().context("cannot read the network namespaces")?);
    let mut current = Current::default();
    match &first {
        Ok(loaded) => {
            apply.apply(&loaded.ruleset)?;
            current.took(loaded);
        }
        Err(rejected) if apply.in_force().epoch == 0 => return Err(NothingInForce(rejected.clone()).into()),
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
    let misplaced = misplaced(Place::read(&location.cgroup), whole_node);
    misplaced.iter().for_each(|weakness| tracing::error!("{}", weakness.message));
    tracing::info!(policy = %policy.display(), epoch = in_force.epoch, cgroup = %location.cgroup.display(), "in force");

    // The tunnel half.
    let half = TunnelHalf::new(half, Arc::new(KernelPinholes::new(cookies)?))?;
    half.connections.publish(current.ruleset.clone());
    let guard = Arc::new(Guard {
        policy: policy.clone(),
        bpffs: location.bpffs.clone(),
        cgroup: location.cgroup.clone(),
        cut: AtomicU64::new(0),
        uncut: AtomicBool::new(false),
        blind: AtomicBool::new(false),
        misplaced,
        netns_helper: programs.netns_helper,
        programs: Mutex::new(programs),
        mended: AtomicU64::new(0),
        current: Mutex::new(current),
        apply: Mutex::new(apply),
        lost,
        in_force: Arc::new(ArcSwap::from_pointee(in_force)),
        usage: Mutex::new(MapCounter::open(&location.bpffs, program_stats)?),
        edge: ArcSwap::default(),
        denials: Arc::new(DenialLog::default()),
        connections: Arc::clone(&half.connections),
        dialer: Arc::clone(&half.dialer),
        tunnel: Arc::clone(&half.tunnel),
    });

    hold_edge(&guard);
    // Connections from before the guard are judged like those from before an edit.
    let cutter = Arc::clone(&guard);
    tokio::task::spawn_blocking(move || cut(&cutter));

    let mut parts = Parts::start(&half, listeners, &guard);
    let (edits_to, edits) = mpsc::channel(1);
    parts.spawn("policy watch", watch::watch(policy, node, first, edits_to));
    let denials = events::drain(events, Arc::clone(&guard.in_force), Arc::clone(&guard.denials));
    parts.spawn_fallible("denial events", denials);
    parts.spawn("hold on the kernel half", hold(Arc::clone(&guard)));
    parts.spawn("watch on cgroups", follow(Arc::clone(&guard), view));
    let taken = async |edit| {
        let at = InForceAt { current: &guard.current, connections: &guard.connections, kernel: Some(&guard) };
        take(at, edit).await
    };
    let clean = parts.run(&half, edits, taken).await.context("the kernel half stays in force")?;
    tracing::info!(clean, "ended; the kernel half stays in force (`nodeguard unpin` removes it)");
    Ok(())
}
