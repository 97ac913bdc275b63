//! Owns the lint: format, clippy (for the host and for the kernel), documentation, dependencies, imports, the shape of the files.
//! Called by `test`.
//! Must never change a file.

mod imports;
#[cfg(test)]
mod planted_tests;
mod tidy;
mod walks;

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    build_ebpf,
    shell::{command, find, root, say},
    tools::CARGO_MACHETE,
};

/// A check's name, and what it does in a workspace.
type Check = (&'static str, fn(&Path) -> Result<()>);

const CHECKS: [Check; 10] = [
    ("fmt", |root| cargo(root, &["fmt", "--all", "--check"])),
    ("clippy", clippy),
    ("clippy for the kernel", |_| build_ebpf::clippy()),
    ("doc", doc),
    // The advisory database is a git repository that not every machine reaches; `cargo deny check` by hand reads it too.
    ("deny", |root| {
        let quiet = ["deny", "--log-level", "error", "--locked", "check", "--hide-inclusion-graph"];
        cargo(root, &[&quiet[..], &["bans", "licenses", "sources"]].concat())
    }),
    ("unused dependencies", unused_dependencies),
    ("policy crate", policy_crate),
    ("imports", imports::imports),
    ("tidy", tidy::tidy),
    ("walks", walks::walks),
];

/// Runs every check whose name contains the filter; returns how many passed and failed.
pub(crate) fn lint(filter: Option<&str>) -> (usize, usize) {
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in CHECKS.into_iter().filter(|(name, _)| filter.is_none_or(|filter| name.contains(filter))) {
        match check(root()) {
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

/// Every target of every member compiles without a warning, the fuzz targets too.
fn clippy(root: &Path) -> Result<()> {
    cargo(root, &["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])
}

/// The documentation of every item, private ones too, has no warning: each link leads somewhere.
fn doc(root: &Path) -> Result<()> {
    let mut doc = command(find("cargo").context("cargo is not in PATH")?);
    doc.args(["doc", "--quiet", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
    // A public item may link to a private one, because both are documented.
    quietly(doc.current_dir(root).env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"))
}

/// Every dependency of a package is named in one of its source files.
fn unused_dependencies(root: &Path) -> Result<()> {
    let mut machete = command(find(CARGO_MACHETE.name).context("cargo-machete is missing: run `cargo xtask setup`")?);
    quietly(machete.arg(root))
}

/// An error with every finding, if there is one.
fn settle(findings: &[String]) -> Result<()> {
    if findings.is_empty() { Ok(()) } else { bail!("{}", findings.join("\n")) }
}

/// What the policy crate must not need: a runtime, the kernel half, the tunnel.
const NOT_FOR_THE_POLICY: [&str; 5] = ["aya", "hyper", "nodeguard", "tokio", "tonic"];

/// The policy crate builds with cargo alone, so that tools and fuzz targets can stand on it.
fn policy_crate(root: &Path) -> Result<()> {
    let mut tree = command(find("cargo").context("cargo is not in PATH")?);
    tree.args(["tree", "--quiet", "--locked", "--package", "guard-policy", "--edges", "normal", "--prefix", "none"]);
    let output = tree.current_dir(root).output().context("cargo tree")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || !printed.starts_with("guard-policy ") {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    let found = not_for_the_policy(&printed);
    if found.is_empty() { Ok(()) } else { bail!("guard-policy depends on {}", found.join(", ")) }
}

/// The crates of a `cargo tree` that the policy crate must not need.
fn not_for_the_policy(tree: &str) -> Vec<&str> {
    let crates = tree.lines().filter_map(|line| line.split(' ').next());
    crates.filter(|name| NOT_FOR_THE_POLICY.contains(name)).collect()
}

fn cargo(root: &Path, arguments: &[&str]) -> Result<()> {
    quietly(command(find("cargo").context("cargo is not in PATH")?).args(arguments).current_dir(root))
}

/// Runs a command; what it printed is the error if it fails.
fn quietly(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    let [printed, errors] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    bail!("{}", [printed.trim(), errors.trim()].join("\n").trim())
}

#[cfg(test)]
mod tests {
    use super::not_for_the_policy;

    #[test]
    fn a_runtime_below_the_policy_crate_is_found() {
        let tree = "guard-policy v0.1.0 (/x)\nguard-common v0.1.0 (/y)\ntokio-util v0.7.1\n";
        assert_eq!(not_for_the_policy(tree), Vec::<&str>::new());
        assert_eq!(not_for_the_policy(&format!("{tree}tokio v1.54.0\naya v0.14.0 (*)\n")), ["tokio", "aya"]);
    }
}
