//! Owns the import lint: no import against the order of the rooms, and no cycle between the files of a crate.
//! Called by `lint`.
//! Must never guess from names: it parses the sources, and a re-export counts for the file that defines the item.

mod cycles;
mod module;
mod resolve;
mod rooms;
mod tree;

use std::{fs, path::Path};

use anyhow::Result;

pub(super) use self::module::is_test;
use self::{resolve::Edges, tree::Tree};
use super::settle;

/// The roots of the crates that are checked. `guard/src/main.rs` is a crate of its own that nothing can import.
const CRATES: [&str; 5] = [
    "guard/src/lib.rs",
    "guard-policy/src/lib.rs",
    "guard-common/src/lib.rs",
    "guard-ebpf/src/main.rs",
    "xtask/src/main.rs",
];

/// Checks every crate of a workspace.
pub(super) fn imports(root: &Path) -> Result<()> {
    let source = |file: &str| fs::read_to_string(root.join(file)).ok();
    let mut findings = Vec::new();
    for main in CRATES.into_iter().filter(|main| root.join(main).is_file()) {
        let edges = imports_of(main, &source)?;
        findings.extend(rooms::upward(&edges));
        findings.extend(cycles::cycles(&edges));
    }
    settle(&findings)
}

/// The imports between the files of the crate with this root.
fn imports_of(main: &str, source: &dyn Fn(&str) -> Option<String>) -> Result<Edges> {
    Ok(resolve::edges(&Tree::read(main, source)?))
}

#[cfg(test)]
mod imports_tests;
