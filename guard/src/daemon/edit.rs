//! Owns bringing an edit into force: the kernel first, then the dials, then the open connections.
//! Called by `run` and `agent` for each edit, and by `hold` for what came in while something was mended.
//! Must never take the last good policy away for one that is rejected or that the kernel refuses.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use guard_policy::{diagnostic::Rejected, policy_file::Edit};

use crate::{
    daemon::state::{Current, Guard},
    dial::connections::Connections,
    kernel::{
        cgroups::follow::Follower,
        cut::{established, established::CutSummary},
        namespaces::NamespaceView,
    },
    sys::lock::lock,
};

/// How often the network namespaces of the pods are read, if a rule guards pods.
const NAMESPACES_EVERY: Duration = Duration::from_secs(2);
/// How many cut connections are named in the log; the number says the rest.
const CUTS_LOGGED: usize = 20;

/// The daemon does not start: its policy is rejected, and no other policy is in force.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.render(false))]
pub struct NothingInForce(pub(crate) Rejected);

impl NothingInForce {
    /// The sentence and the findings.
    pub fn render(&self, colour: bool) -> String {
        format!("the policy is rejected, and there is none in force:\n{}", self.0.render(colour))
    }
}

/// What an edit changes. One for both daemons: without a kernel half, only the dials are judged again.
pub(crate) struct InForceAt<'a> {
    /// What `status` says of the policy.
    pub(crate) current: &'a Mutex<Current>,
    /// The dials.
    pub(crate) connections: &'a Connections,
    /// The kernel half, where there is one.
    pub(crate) kernel: Option<&'a Arc<Guard>>,
}

/// Takes an edit: 1. a rejected one changes nothing; 2. the kernel, where a failure changes nothing either; 3. the open dials; 4. the open
/// connections and the edge tier, in the background. "In force" is logged after the third.
pub(crate) async fn take(at: InForceAt<'_>, edit: Edit) -> anyhow::Result<()> {
    let started = Instant::now();
    let InForceAt { current, connections, kernel } = at;

    // 1. The document compiled, or the last good policy stays.
    let loaded = match edit {
        Ok(loaded) => loaded,
        Err(rejected) => {
            let epoch = kernel.map(|guard| guard.in_force.load().epoch);
            tracing::error!(
                epoch,
                "the edit is rejected; the last good policy stays in force:\n{}",
                rejected.render(false)
            );
            lock(current).rejected(&rejected);
            return Ok(());
        }
    };

    // 2. The kernel.
    let mut epoch = None;
    if let Some(guard) = kernel {
        let (applier, ruleset) = (Arc::clone(guard), Arc::clone(&loaded.ruleset));
        match tokio::task::spawn_blocking(move || lock(&applier.apply).apply(&ruleset)).await? {
            Ok(in_force) => {
                epoch = Some(in_force.epoch);
                guard.in_force.store(Arc::new(in_force));
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                tracing::error!(
                    error = format!("{error:#}"),
                    "the edit cannot be brought into the kernel; the last good policy stays in force"
                );
                lock(current).failed(format!("{error:#}"));
                return Ok(());
            }
        }
    }

    // 3. The open dials.
    let closed_dials = connections.publish(Some(Arc::clone(&loaded.ruleset)));
    if !loaded.warnings.is_empty() {
        tracing::warn!("the policy has warnings:\n{}", loaded.source.render(&loaded.warnings, false));
    }
    lock(current).took(&loaded);

    // 4. What is open beside the tunnel.
    if let Some(guard) = kernel {
        let (cutter, holder) = (Arc::clone(guard), Arc::clone(guard));
        tokio::task::spawn_blocking(move || cut(&cutter));
        tokio::task::spawn_blocking(move || hold_edge(&holder));
    }
    let milliseconds = started.elapsed().as_millis() as u64;
    tracing::info!(policy = loaded.ruleset.name, epoch, closed_dials, milliseconds, "in force");
    Ok(())
}

/// Keeps what the policy says of cgroups and of pods true while these come and go.
pub(crate) async fn follow(guard: Arc<Guard>, mut view: NamespaceView) {
    let mut follower = Follower::start();
    let mut looked = Instant::now();
    loop {
        let mut guards_pods = false;
        if let Some((ruleset, _)) = lock(&guard.apply).followed() {
            follower.watch(&guard.cgroup, &ruleset);
            guards_pods = ruleset.tables.pods_cgroup.is_some();
        }
        let looks = guards_pods && looked.elapsed() >= NAMESPACES_EVERY;
        let applier = Arc::clone(&guard);
        let followed = tokio::task::spawn_blocking(move || {
            if looks {
                see(&applier, &mut view);
            }
            let followed = lock(&applier.apply).follow();
            if matches!(followed, Ok(true)) {
                // What was opened before the change was seen is judged by what is known now.
                cut(&applier);
            }
            (followed, view)
        });
        let followed = match followed.await {
            Ok((followed, returned)) => {
                view = returned;
                followed.map_err(anyhow::Error::from)
            }
            Err(error) => {
                view = NamespaceView::default();
                Err(error.into())
            }
        };
        if looks {
            looked = Instant::now();
        }
        if let Err(error) = followed {
            tracing::error!(
                error = format!("{error:#}"),
                "a cgroup that the policy names or a pod came or went and cannot be brought into the kernel; callers in it may be denied"
            );
        }
        follower.changed().await;
    }
}

/// Reads the network namespaces. One that cannot be entered stays unknown: the address of each packet tells its rules.
fn see(guard: &Guard, view: &mut NamespaceView) {
    match view.look() {
        Ok(namespaces) => lock(&guard.apply).see(namespaces),
        Err(error) => tracing::warn!(%error, "the network namespaces of the pods cannot be read"),
    }
}

/// Cuts the connections that were open before the ruleset in force and that it does not admit.
pub(crate) fn cut(guard: &Guard) {
    let Some(image) = lock(&guard.apply).image() else { return };
    let summary = match established::cut_denied(&image, &guard.cgroup) {
        Ok(summary) => summary,
        Err(error) => {
            guard.uncut.store(true, Ordering::Relaxed);
            return tracing::error!(%error, "open connections cannot be judged: those that are no longer admitted go on");
        }
    };
    let CutSummary { namespaces, judged, cut, failed, blind } = summary;
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

#[cfg(test)]
mod tests {
    use guard_policy::{compile::compile, diagnostic::Source, node_facts::NodeFacts, policy_file::LoadedPolicy};

    use super::*;

    fn edit(text: &str) -> Edit {
        let source = Source { path: "policy.yaml".into(), text: text.to_owned() };
        match compile(&source, &NodeFacts::default()) {
            Ok((ruleset, warnings)) => Ok(LoadedPolicy { source, ruleset: Arc::new(ruleset), warnings }),
            Err(diagnostics) => Err(Rejected { source, diagnostics }),
        }
    }

    #[tokio::test]
    async fn a_rejected_edit_keeps_the_last_good_policy_and_says_so() {
        let good = include_str!("../../../deploy/policies/worker.yaml");
        let (current, connections) = (Mutex::default(), Connections::new(NodeFacts::default()));
        let taken = async |text: &str| {
            let at = InForceAt { current: &current, connections: &connections, kernel: None };
            take(at, edit(text)).await.unwrap();
            (lock(&current).last_error.is_some(), connections.ruleset().map(|ruleset| ruleset.name.clone()))
        };
        assert_eq!(taken("nonsense").await, (true, None));
        assert_eq!(taken(good).await, (false, Some("worker".to_owned())));
        assert_eq!(taken(&good.replace("Enforce", "Enforcing")).await, (true, Some("worker".to_owned())));
        assert_eq!(taken(&good.replace("name: worker", "name: other")).await, (false, Some("other".to_owned())));
    }
}
