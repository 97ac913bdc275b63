//! Owns which cgroups a policy means on this node now: a service's cgroup is removed and made anew on every restart.
//! Called by `apply` for the ids, and by `app` to be told when they may have changed.
//! Must never keep the id of a cgroup that is gone: another one could be at its path.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use guard_policy::{
    ruleset::Ruleset,
    tables::cgroups::{Cgroups, paths},
};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// How often cgroups are looked for even if nothing was told.
const LOOK: Duration = Duration::from_secs(1);

/// Looks up every cgroup that a ruleset names, below the guarded one.
pub fn find(base: &Path, ruleset: &Ruleset) -> Cgroups {
    let found = |path: String| {
        let metadata = fs::metadata(base.join(path.trim_start_matches('/'))).ok()?;
        metadata.is_dir().then(|| (path, metadata.ino()))
    };
    paths(ruleset).into_iter().filter_map(found).collect()
}

/// Sees cgroups come and go.
pub struct Follower {
    watcher: Option<RecommendedWatcher>,
    watched: BTreeSet<PathBuf>,
    told: mpsc::Receiver<()>,
}

impl Follower {
    /// Watches nothing yet. Where the kernel gives no notifications, cgroups are looked for every second.
    pub fn start() -> Follower {
        let (tell, told) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| {
                matches!(event.kind, EventKind::Create(_) | EventKind::Remove(_) | EventKind::Modify(_))
            }) {
                // Full means that it is told already.
                let _ = tell.try_send(());
            }
        });
        if let Err(error) = &watcher {
            tracing::warn!(%error, "cgroups are looked for every second: the kernel cannot tell of them");
        }
        Follower { watcher: watcher.ok(), watched: BTreeSet::new(), told }
    }

    /// Watches what is there of the way to every cgroup that a ruleset names. What appears deeper is seen at the next call.
    pub fn watch(&mut self, base: &Path, ruleset: &Ruleset) {
        let Some(watcher) = &mut self.watcher else { return };
        let parents = paths(ruleset).into_iter().filter_map(|path| {
            let parent = base.join(path.trim_start_matches('/')).parent()?.to_path_buf();
            parent.ancestors().find(|path| path.is_dir()).map(Path::to_path_buf)
        });
        let wanted: BTreeSet<PathBuf> = parents.collect();
        for gone in self.watched.difference(&wanted) {
            // A directory that was removed is watched no more by itself.
            let _ = watcher.unwatch(gone);
        }
        // Each time anew: a directory may be another one than the one that was watched under its name.
        let mut is_watched = |path: &PathBuf| watcher.watch(path, RecursiveMode::NonRecursive).is_ok();
        self.watched = wanted.into_iter().filter(|path| is_watched(path)).collect();
    }

    /// Waits until a cgroup may have come or gone.
    pub async fn changed(&mut self) {
        let told = async {
            if self.told.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
        };
        let _ = tokio::time::timeout(LOOK, told).await;
    }
}
