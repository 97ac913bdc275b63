//! Owns noticing that files may have changed: their directories are watched; SIGHUP and a slow poll make up for what a watch misses.
//! Called by `policy/watch` and by `tunnel/material`.
//! Must never read the files: who asks compares what they hold.

use std::{path::Path, time::Duration};

use notify::{RecursiveMode, Watcher};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::timeout,
};

/// How often files are read without any event: a watch can be lost (a directory that is replaced, too many watches).
const POLL: Duration = Duration::from_secs(2);

/// How much longer than the quiet that is waited for a change may take.
const BREATH: u32 = 10;

/// What may tell of a change.
pub(crate) struct Changes {
    _watcher: Option<notify::RecommendedWatcher>,
    events: mpsc::Receiver<()>,
    hangup: Option<Signal>,
}

impl Changes {
    /// Watches the directories, not the files: an editor renames a new file over one, a ConfigMap volume swaps a symlink beside it.
    pub(crate) fn of(paths: &[&Path]) -> Changes {
        let (changed, events) = mpsc::channel::<()>(1);
        let watcher = start(paths, changed);
        if let Err(error) = &watcher {
            tracing::error!(%error, ?paths, poll = ?POLL, "cannot watch a directory: edits are seen by reading the files from time to time");
        }
        Changes { _watcher: watcher.ok(), events, hangup: signal(SignalKind::hangup()).ok() }
    }

    /// The next time that something may have changed: an event and what comes in the same breath, a SIGHUP, or the poll.
    pub(crate) async fn next(&mut self, quiet: Duration) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = timeout(POLL, self.events.recv()) => {
                if matches!(event, Ok(None)) {
                    tokio::time::sleep(POLL).await;
                }
            }
            _ = hangup => tracing::info!("SIGHUP: files are read again"),
        }
        // A directory may never be quiet: somebody writes a log there.
        let breath = async { while matches!(timeout(quiet, self.events.recv()).await, Ok(Some(()))) {} };
        let _ = timeout(quiet * BREATH, breath).await;
    }
}

fn start(paths: &[&Path], changed: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access() || event.need_rescan()) {
            // Full means that a change is waiting already.
            let _ = changed.try_send(());
        }
    })?;
    let mut watched = Vec::new();
    for path in paths {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let own = directory.canonicalize().unwrap_or_else(|_| directory.to_path_buf());
        // Where the file is a link to elsewhere, there too.
        let target = path.canonicalize().ok().and_then(|target| target.parent().map(Path::to_path_buf));
        for directory in [Some(own), target].into_iter().flatten() {
            if !watched.contains(&directory) {
                watcher.watch(&directory, RecursiveMode::NonRecursive)?;
                watched.push(directory);
            }
        }
    }
    Ok(watcher)
}
