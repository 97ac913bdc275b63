//! Owns the lint: format, clippy (for the host and for the kernel), documentation, dependencies, imports, the shape of the files.
//! Called by `test`.
//! Must never change a file.

mod imports;
mod mode;
mod tidy;

use std::{path::Path, process::Command};

use anyhow::{Context, Result};

use crate::{
    build_ebpf,
    shell::{command, find, root, run, say},
    tools::CARGO_MACHETE,
};

/// A check's name and what it does.
type Check = (&'static str, fn() -> Result<()>);

const CHECKS: [Check; 8] = [
    ("fmt", || cargo(&["fmt", "--all", "--check"])),
    // The fuzz targets are members of the workspace.
    ("clippy", || cargo(&["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])),
    ("clippy for the kernel", build_ebpf::clippy),
    ("doc", doc),
    // The advisory database is a git repository that not every machine reaches; `cargo deny check` by hand reads it too.
    ("deny", || {
        let quiet = ["deny", "--log-level", "error", "--locked", "check", "--hide-inclusion-graph"];
        cargo(&[&quiet[..], &["bans", "licenses", "sources"]].concat())
    }),
    ("unused dependencies", || run(&mut unused_dependencies(root())?)),
    ("imports", imports::imports),
    ("tidy", tidy::tidy),
];

/// Runs every check whose name contains the filter; returns how many passed and failed.
pub(crate) fn lint(filter: Option<&str>) -> (usize, usize) {
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in CHECKS.into_iter().filter(|(name, _)| filter.is_none_or(|filter| name.contains(filter))) {
        match check() {
            Ok(()) => {
                say(format!("lint {name} ... ok"));
                passed += 1;
            }
            Err(error) => {
                say(format!("lint {name} ... FAILED\n{error:#}"));
                failed += 1;
            }
        }
    }
    (passed, failed)
}

fn cargo(arguments: &[&str]) -> Result<()> {
    run(command(find("cargo").context("cargo is not in PATH")?).args(arguments))
}

/// The documentation of every item, private ones too, without a warning: each link leads somewhere.
fn doc() -> Result<()> {
    let mut doc = command(find("cargo").context("cargo is not in PATH")?);
    doc.args(["doc", "--quiet", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
    run(doc.env("RUSTDOCFLAGS", "-D warnings"))
}

/// Finds dependencies of the packages in a directory that no source file of theirs names.
fn unused_dependencies(directory: &Path) -> Result<Command> {
    let mut machete = command(find(CARGO_MACHETE.name).context("cargo-machete is not installed")?);
    machete.arg(directory);
    Ok(machete)
}
