//! Owns the import lint: no import against the order of the rooms, and no cycle between the files of a crate.
//! Called by `lint`.
//! Must never guess from names: it parses the sources, and a re-export counts for the file that defines the item.

mod cycles;
mod module;
mod resolve;
mod rooms;
mod tree;

use std::fs;

use anyhow::{Result, bail};

use self::{resolve::Edges, tree::Tree};
use crate::shell::{root, say};

/// What happens to a finding.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// It is printed.
    Warn,
    /// It fails the lint.
    Refuse,
}

/// The roots of the crates that are checked, and what a cycle in them does. `guard/src/main.rs` is a crate of its own that nothing can import.
const CRATES: [(&str, Mode); 5] = [
    ("guard/src/lib.rs", Mode::Warn),
    ("guard-policy/src/lib.rs", Mode::Warn),
    ("guard-common/src/lib.rs", Mode::Warn),
    ("guard-ebpf/src/main.rs", Mode::Warn),
    ("xtask/src/main.rs", Mode::Refuse),
];

/// What an import against the order of the rooms does.
const UPWARD: Mode = Mode::Warn;

/// Checks every crate.
pub(super) fn imports() -> Result<()> {
    let source = |file: &str| fs::read_to_string(root().join(file)).ok();
    let mut refused = Vec::new();
    for (main, mode) in CRATES.into_iter().filter(|(main, _)| root().join(main).is_file()) {
        let edges = imports_of(main, &source)?;
        for (mode, findings) in [(UPWARD, rooms::upward(&edges)), (mode, cycles::cycles(&edges))] {
            match mode {
                Mode::Refuse => refused.extend(findings),
                Mode::Warn => findings.iter().for_each(|finding| say(format!("warning: {finding}"))),
            }
        }
    }
    if refused.is_empty() { Ok(()) } else { bail!("{}", refused.join("\n")) }
}

/// The imports between the files of the crate with this root.
fn imports_of(main: &str, source: &dyn Fn(&str) -> Option<String>) -> Result<Edges> {
    Ok(resolve::edges(&Tree::read(main, source)?))
}

#[cfg(test)]
mod imports_tests;
