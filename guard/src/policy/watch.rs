//! Owns the policy file: reads it, and reads it again whenever its directory changes.
//! Called by `app`, which gets each new ruleset or why there is none.
//! Must never report a ruleset twice, and never let a broken edit take the place of the last good one.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::sync::mpsc;

use super::{
    compile::compile,
    diagnostic::{Diagnostic, Rejected, Source},
    ruleset::Ruleset,
};
use crate::{changes::Changes, node::NodeFacts};

/// A file larger than this is no policy: 100,000 prefixes are about 4 MB.
const MAX_BYTES: u64 = 32 << 20;
/// How long the directory has to be quiet before the file is read: an editor's write is several events.
const QUIET: Duration = Duration::from_millis(5);

/// A document that compiled.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The document.
    pub source: Source,
    /// What it means.
    pub ruleset: Arc<Ruleset>,
    /// What may not be meant.
    pub warnings: Vec<Diagnostic>,
}

/// What became of an edit.
pub type Edit = Result<Loaded, Rejected>;

/// Reads and compiles the file.
pub fn load(path: &Path, node: &NodeFacts) -> Edit {
    let source = Source { path: path.to_path_buf(), text: read(path)? };
    match compile(&source, node) {
        Ok((ruleset, warnings)) => Ok(Loaded { source, ruleset: Arc::new(ruleset), warnings }),
        Err(diagnostics) => Err(Rejected { source, diagnostics }),
    }
}

/// Watches the file until the receiver is dropped. `last` is what was loaded before; only what differs from it is sent.
pub async fn watch(path: PathBuf, node: NodeFacts, last: Edit, edits: mpsc::Sender<Edit>) {
    let mut last = text_of(&last);
    let mut changes = Changes::of(&[&path]);
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

fn read(path: &Path) -> Result<String, Rejected> {
    let failed = |message: String, help: &str| Rejected::unreadable(path, "NG001", message, help);
    let opened = std::fs::metadata(path).and_then(|about| {
        if about.len() > MAX_BYTES {
            return Err(io::Error::other(format!("it has {} bytes, more than {MAX_BYTES}", about.len())));
        }
        std::fs::read(path)
    });
    let bytes =
        opened.map_err(|error| failed(format!("cannot read the policy: {error}"), "name the file with --policy"))?;
    String::from_utf8(bytes).map_err(|error| {
        let good =
            String::from_utf8_lossy(error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default())
                .into_owned();
        let source = Source { path: path.to_path_buf(), text: good };
        let end = source.text.len();
        let diagnostic = Diagnostic::error(
            "NG001",
            end.saturating_sub(1)..end,
            "the policy is not UTF-8",
            "the text is broken right after this",
        );
        Rejected { source, diagnostics: vec![diagnostic] }
    })
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
