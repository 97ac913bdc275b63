//! Owns the checks that need no test: format, clippy (for the host and for the kernel), licences and sources, the shape of the files.
//! Called by `test`.
//! Must never change a file.

mod imports;

use std::fs;

use anyhow::{Context, Result, bail};

use crate::{
    build_ebpf,
    shell::{command, find, read, root, run, say},
};

/// Lines of a file without its tests, about which it should be split by case.
const LONG: usize = 400;

/// A check's name and what it does.
type Check = (&'static str, fn() -> Result<()>);

const CHECKS: [Check; 6] = [
    ("fmt", || cargo(&["fmt", "--all", "--check"])),
    ("clippy", || cargo(&["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])),
    ("clippy for the kernel", build_ebpf::clippy),
    // The advisory database is a git repository that not every machine reaches: `cargo deny check` by hand has it too.
    ("deny", || {
        cargo(&[
            "deny",
            "--log-level",
            "error",
            "--locked",
            "check",
            "--hide-inclusion-graph",
            "bans",
            "licenses",
            "sources",
        ])
    }),
    ("imports", imports::imports),
    ("tidy", tidy),
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

/// Files that are too long, unfinished places, modules that do not say what they own.
fn tidy() -> Result<()> {
    let mut found = Vec::new();
    for name in read(command("git").args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"]))?.lines() {
        let Ok(text) = fs::read_to_string(root().join(name)) else { continue };
        let code = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
        if code > LONG {
            found.push(format!("{name}: {code} lines before its tests, more than {LONG}: split it by case"));
        }
        if !text.starts_with("//!") {
            found.push(format!("{name}: does not open with what it owns"));
        }
        let unfinished = ["TO", "FIX"].map(|start| start.to_owned() + if start == "TO" { "DO" } else { "ME" });
        for (number, line) in text.lines().enumerate() {
            if unfinished.iter().any(|word| line.contains(word)) {
                found.push(format!("{name}:{}: unfinished", number + 1));
            }
        }
    }
    if found.is_empty() { Ok(()) } else { bail!("{}", found.join("\n")) }
}
