//! Owns reading a policy file: UTF-8 text of bounded size, compiled for this node.
//! Called by `daemon/run` and `daemon/agent` at start, by `daemon/policy_watch` on every change, and by `nodeguard check`.
//! Must never return half of a document.

use std::{io, path::Path, sync::Arc};

use crate::{
    compile::compile,
    diagnostic::{Diagnostic, Rejected, Source},
    node_facts::NodeFacts,
    ruleset::Ruleset,
};

/// The largest file that is read, in bytes. A policy with 100,000 prefixes has about 4 MB.
const MAX_BYTES: u64 = 32 << 20;

/// A policy file that was read and compiled.
#[derive(Clone, Debug)]
pub struct LoadedPolicy {
    /// The file and its text.
    pub source: Source,
    /// The compiled policy.
    pub ruleset: Arc<Ruleset>,
    /// Warnings: the policy is valid but may not do what its author expects.
    pub warnings: Vec<Diagnostic>,
}

/// The outcome of reading a policy file: a policy that can come into force, or the reasons why it is rejected.
pub type Edit = Result<LoadedPolicy, Rejected>;

/// Reads and compiles the file. Rejects it with NG001 if it cannot be read, and with the errors of [`compile`] otherwise.
pub fn load(path: &Path, node: &NodeFacts) -> Edit {
    let source = Source { path: path.to_path_buf(), text: read(path)? };
    match compile(&source, node) {
        Ok((ruleset, warnings)) => Ok(LoadedPolicy { source, ruleset: Arc::new(ruleset), warnings }),
        Err(diagnostics) => Err(Rejected { source, diagnostics }),
    }
}

/// Reads the text of a policy file. Rejects with NG001 a file that cannot be read, is larger than 32 MiB or is not UTF-8.
pub fn read(path: &Path) -> Result<String, Rejected> {
    let failed = |message: String, help: &str| Rejected::unreadable(path, "NG001", message, help);
    let opened = std::fs::metadata(path).and_then(|about| {
        if about.len() > MAX_BYTES {
            return Err(io::Error::other(format!(
                "the file has {} bytes; at most {MAX_BYTES} are allowed",
                about.len()
            )));
        }
        std::fs::read(path)
    });
    let bytes =
        opened.map_err(|error| failed(format!("cannot read the policy file: {error}"), "--policy names the file"))?;
    String::from_utf8(bytes).map_err(|error| {
        let good =
            String::from_utf8_lossy(error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default())
                .into_owned();
        let source = Source { path: path.to_path_buf(), text: good };
        let end = source.text.len();
        let diagnostic = Diagnostic::error(
            "NG001",
            end.saturating_sub(1)..end,
            "the policy file is not UTF-8 text",
            "the first invalid byte follows here",
        );
        Rejected { source, diagnostics: vec![diagnostic] }
    })
}
