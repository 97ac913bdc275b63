//! Owns reading a policy file: the text, strictly UTF-8 and of bounded size, and what it compiles to.
//! Called by the daemon on every change, and by `nodeguard check`.
//! Must never return half of a document.

use std::{io, path::Path, sync::Arc};

use crate::{
    compile::compile,
    diagnostic::{Diagnostic, Rejected, Source},
    node_facts::NodeFacts,
    ruleset::Ruleset,
};

/// A file larger than this is no policy: 100,000 prefixes are about 4 MB.
const MAX_BYTES: u64 = 32 << 20;

/// A document that compiled.
#[derive(Clone, Debug)]
pub struct LoadedPolicy {
    /// The document.
    pub source: Source,
    /// What it means.
    pub ruleset: Arc<Ruleset>,
    /// What may not be meant.
    pub warnings: Vec<Diagnostic>,
}

/// What became of an edit.
pub type Edit = Result<LoadedPolicy, Rejected>;

/// Reads and compiles the file.
pub fn load(path: &Path, node: &NodeFacts) -> Edit {
    let source = Source { path: path.to_path_buf(), text: read(path)? };
    match compile(&source, node) {
        Ok((ruleset, warnings)) => Ok(LoadedPolicy { source, ruleset: Arc::new(ruleset), warnings }),
        Err(diagnostics) => Err(Rejected { source, diagnostics }),
    }
}

/// Reads the text of a policy file.
pub fn read(path: &Path) -> Result<String, Rejected> {
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
