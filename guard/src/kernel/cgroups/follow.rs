//! Owns which cgroups a policy means on this node now: a service's cgroup is removed and created anew on every restart.
//! Called by `kernel/tables/apply` for the ids, and by `daemon` to learn when they may have changed.
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
use tokio::sync::mpsc;

use crate::sys::file_watch::DirectoryWatch;

/// How often cgroups are looked up without any event.
const POLL: Duration = Duration::from_secs(1);

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
    watch: Option<DirectoryWatch>,
    changes: mpsc::Receiver<()>,
}

impl Follower {
    /// Watches nothing yet. If the kernel gives no notifications, cgroups are polled.
    pub fn start() -> Follower {
        match DirectoryWatch::start() {
            Ok((watch, changes)) => Follower { watch: Some(watch), changes },
            Err(error) => {
                tracing::warn!(%error, "cannot watch cgroups; polling every second instead");
                Follower { watch: None, changes: mpsc::channel(1).1 }
            }
        }
    }

    /// Watches the deepest existing directory on the path to each cgroup that a ruleset names. A deeper directory is seen at the next call.
    pub fn watch(&mut self, base: &Path, ruleset: &Ruleset) {
        let Some(watch) = &mut self.watch else { return };
        let parents = paths(ruleset).into_iter().filter_map(|path| {
            let parent = base.join(path.trim_start_matches('/')).parent()?.to_path_buf();
            parent.ancestors().find(|path| path.is_dir()).map(Path::to_path_buf)
        });
        // A directory that is gone by now is looked up by the poll.
        let _ = watch.watch(parents.collect::<BTreeSet<PathBuf>>());
    }

    /// Waits until a cgroup may have come or gone.
    pub async fn changed(&mut self) {
        let change = async {
            if self.changes.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
        };
        let _ = tokio::time::timeout(POLL, change).await;
    }
}
