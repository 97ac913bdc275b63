//! Owns the watch on files and directories: one wrapper of notify, and a watch on files that SIGHUP and a slow poll complement.
//! Called by `daemon/policy_watch`, `tunnel/stream/credentials` and `kernel/cgroups/follow`.
//! Must never read the files: the caller compares what they hold.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::timeout,
};

/// How often files are read without any event: a watch can be lost (a directory that is replaced, too many watches).
const POLL: Duration = Duration::from_secs(2);

/// How much longer than the requested quiet the wait for it may take.
const SETTLE: u32 = 10;

/// Directories whose entries are watched.
pub(crate) struct DirectoryWatch {
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
}

impl DirectoryWatch {
    /// Watches nothing yet. The receiver gets one message for any number of changes.
    pub(crate) fn start() -> notify::Result<(DirectoryWatch, mpsc::Receiver<()>)> {
        let (sender, changes) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let is_change = |event: &notify::Event| !matches!(event.kind, EventKind::Access(_)) || event.need_rescan();
            if event.as_ref().is_ok_and(is_change) {
                // If the channel is full, a change is waiting already.
                let _ = sender.try_send(());
            }
        })?;
        Ok((DirectoryWatch { watcher, watched: BTreeSet::new() }, changes))
    }

    /// Watches exactly these directories, and returns the errors of those that cannot be watched.
    pub(crate) fn watch(&mut self, wanted: BTreeSet<PathBuf>) -> Vec<notify::Error> {
        for gone in self.watched.difference(&wanted) {
            // The watch on a directory that was removed has ended by itself.
            let _ = self.watcher.unwatch(gone);
        }
        self.watched.clear();
        let mut failed = Vec::new();
        for path in wanted {
            // Every time anew: there may be another directory under the same name by now.
            match self.watcher.watch(&path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched.insert(path);
                }
                Err(error) => failed.push(error),
            }
        }
        failed
    }
}

/// Files that are watched through their directories.
pub(crate) struct FileWatch {
    _watch: Option<DirectoryWatch>,
    changes: mpsc::Receiver<()>,
    hangup: Option<Signal>,
}

impl FileWatch {
    /// Watches the directories, not the files: an editor renames a new file over one, a ConfigMap volume swaps a symlink beside it.
    pub(crate) fn start(paths: &[&Path]) -> FileWatch {
        let started = DirectoryWatch::start().and_then(|(mut watch, changes)| {
            let failed = watch.watch(paths.iter().flat_map(|path| directories(path)).collect());
            failed.into_iter().next().map_or(Ok((watch, changes)), Err)
        });
        let (watch, changes) = match started {
            Ok((watch, changes)) => (Some(watch), changes),
            Err(error) => {
                tracing::error!(%error, ?paths, poll = ?POLL, "cannot watch a directory; polling its files instead");
                (None, mpsc::channel(1).1)
            }
        };
        FileWatch { _watch: watch, changes, hangup: signal(SignalKind::hangup()).ok() }
    }

    /// Waits until a file may have changed: an event and those that follow it closely, a SIGHUP, or the poll.
    pub(crate) async fn next(&mut self, quiet: Duration) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            change = timeout(POLL, self.changes.recv()) => {
                if matches!(change, Ok(None)) {
                    tokio::time::sleep(POLL).await;
                }
            }
            _ = hangup => tracing::info!("SIGHUP: files are read again"),
        }
        // A directory may never be quiet, for example if a log is written there.
        let settled = async { while matches!(timeout(quiet, self.changes.recv()).await, Ok(Some(()))) {} };
        let _ = timeout(quiet * SETTLE, settled).await;
    }
}

/// The directory of a file and, if the file is a link, the directory of its target.
fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = directory.canonicalize().unwrap_or_else(|_| directory.to_path_buf());
    let target = path.canonicalize().ok().and_then(|target| target.parent().map(Path::to_path_buf));
    [Some(own), target].into_iter().flatten()
}
