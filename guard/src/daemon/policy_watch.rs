//! Owns the policy file: reads it, and reads it again whenever its directory changes.
//! Called by `run` and `agent`, which get each new ruleset, or why there is none.
//! Must never report a ruleset twice, and never let a broken edit take the place of the last good one.

use std::{path::PathBuf, time::Duration};

use guard_policy::{
    node_facts::NodeFacts,
    policy_file::{Edit, load, read},
};
use tokio::sync::mpsc;

use crate::sys::file_watch::FileWatch;

/// How long the directory has to be quiet before the file is read: an editor's write is several events.
const QUIET: Duration = Duration::from_millis(5);

/// Watches the file until the receiver is dropped. `last` is what was loaded before; only what differs from it is sent.
pub async fn watch(path: PathBuf, node: NodeFacts, last: Edit, edits: mpsc::Sender<Edit>) {
    let mut last = text_of(&last);
    let mut changes = FileWatch::start(&[&path]);
    while !edits.is_closed() {
        changes.next(QUIET).await;
        let (path, node) = (path.clone(), node.clone());
        let before = last.clone();
        let edit = tokio::task::spawn_blocking(move || {
            let text = read(&path).map_err(|rejected| rejected.diagnostics);
            (before != text.ok()).then(|| load(&path, &node))
        });
        let Ok(Some(edit)) = edit.await else { continue };
        // A file that cannot be read stays a difference; it is reported once.
        let text = text_of(&edit);
        if text.is_none() && last.is_none() {
            continue;
        }
        last = text;
        if edits.send(edit).await.is_err() {
            return;
        }
    }
}

/// The text that an edit was made from; `None` where the file could not be read.
fn text_of(edit: &Edit) -> Option<String> {
    match edit {
        Ok(loaded) => Some(loaded.source.text.clone()),
        Err(rejected) if rejected.diagnostics.iter().any(|finding| finding.span.is_some()) => {
            Some(rejected.source.text.clone())
        }
        Err(_) => None,
    }
}

#[cfg(test)]
#[path = "policy_watch_tests.rs"]
mod tests;
