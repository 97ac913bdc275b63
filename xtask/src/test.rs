//! Owns `cargo xtask test`: the set-up, then every area, then one line with the totals.
//! Called as `cargo xtask test [AREA [FILTER]]`, and by CI.
//! Must never succeed with a failed test, and in CI not with a skipped one.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    demo, fuzz, kernels, lint, setup,
    shell::{MEMBERS, command, find, root, say},
};

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Area {
    /// Format, clippy, documentation, dependencies, imports, shape of the files
    Lint,
    /// Unit tests, property tests and doc tests of every crate
    Unit,
    /// Every kernel program: the verifier accepts it, and it decides as the host does
    Kernel,
    /// The kernel half on several kernels, in virtual machines
    Kernels,
    /// Policy files: a corpus, broken ones, and `nodeguard check`
    Policy,
    /// The agent with the real proxy-server
    Tunnel,
    /// The whole guard in network namespaces
    Lab,
    /// The guard as its DaemonSet in a real cluster; only by name or in a soak, because it first builds a whole Kubernetes
    Cluster,
}

/// How many tests passed, failed and were skipped.
#[derive(Default)]
struct Total {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Runs one area or all.
pub(crate) fn test(area: Option<Area>, filter: Option<&str>, options: demo::Options) -> Result<()> {
    setup::root_or_say("test")?;
    match area {
        Some(Area::Cluster) => {}
        Some(Area::Lint) => setup::setup(setup::For::Lint)?,
        _ => setup::setup(setup::For::Test)?,
    }
    let mut total = Total::default();
    let wanted = |each: &Area| area.map_or(is_soak() || *each != Area::Cluster, |area| area == *each);
    for each in Area::value_variants().iter().filter(|each| wanted(each)) {
        say(format!("\n== {}", each.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())));
        run(*each, filter, options, &mut total)?;
    }
    let Total { passed, failed, skipped } = total;
    say(format!("\ntotal: {passed} passed, {failed} failed, {skipped} skipped"));
    if failed > 0 {
        bail!("{failed} failed");
    }
    if skipped > 0 && std::env::var_os("CI").is_some() {
        bail!("{skipped} skipped, and in CI nothing may be");
    }
    if passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

fn is_soak() -> bool {
    std::env::var_os("NODEGUARD_SOAK").is_some()
}

/// Runs the same at full counts: the tests read this from their environment.
pub(crate) fn soak(area: Option<Area>, filter: Option<&str>, options: demo::Options) -> Result<()> {
    let mut soak = command(std::env::current_exe()?);
    let area = area.and_then(|area| area.to_possible_value()).map(|value| value.get_name().to_owned());
    crate::shell::run(soak.arg("test").args(options.words()).args(area).args(filter).env("NODEGUARD_SOAK", "1"))
}

fn run(area: Area, filter: Option<&str>, options: demo::Options, total: &mut Total) -> Result<()> {
    match area {
        Area::Lint => {
            let (passed, failed) = lint::lint(filter);
            total.passed += passed;
            total.failed += failed;
            Ok(())
        }
        Area::Unit => {
            cargo_test(&["--lib", "--bins"], filter, total)?;
            cargo_test(&["--doc"], filter, total)?;
            if is_soak() && filter.is_none() {
                let fuzz::Outcome { passed, failed, skipped } = fuzz::soak()?;
                total.passed += passed;
                total.failed += failed;
                total.skipped += skipped;
            }
            Ok(())
        }
        Area::Kernel => cargo_test(&["--test", "kernel"], filter, total),
        Area::Kernels => {
            let (held, failed) = kernels::kernels()?;
            total.passed += held;
            total.failed += failed;
            Ok(())
        }
        Area::Policy => with_daemon(&["--test", "policy"], filter, total),
        Area::Tunnel => with_daemon(&["--test", "tunnel"], filter, total),
        Area::Lab => {
            other_abi_daemon()?;
            with_daemon(&["--test", "lab"], filter, total)
        }
        Area::Cluster => {
            let mut lab = demo::cluster_lab(options)?;
            counted(lab.arg("run").args(filter), total)
        }
    }
}

/// Tests that start the daemon need its binary built first.
fn with_daemon(arguments: &[&str], filter: Option<&str>, total: &mut Total) -> Result<()> {
    let mut build = command(find("cargo").context("cargo is not in PATH")?);
    crate::shell::run(build.args(["build", "--quiet", "--locked"]).args(MEMBERS).args(["--bin", "nodeguard"]))?;
    cargo_test(arguments, filter, total)
}

/// Builds a daemon of another ABI and copies it aside: the ordinary one is built after it under the same name.
fn other_abi_daemon() -> Result<()> {
    let mut build = command(find("cargo").context("cargo is not in PATH")?);
    build.args(["build", "--quiet", "--locked"]).args(MEMBERS).args(["--bin", "nodeguard"]);
    crate::shell::run(build.args(["--features", "nodeguard/other-abi"]))?;
    let built = root().join("target/debug");
    let (from, to) = (built.join("nodeguard"), built.join("nodeguard-other-abi"));
    if !same(&from, &to) {
        // Copied and renamed, so that one that still runs keeps its file.
        let aside = built.join("nodeguard-other-abi.new");
        std::fs::copy(&from, &aside)?;
        std::fs::rename(&aside, &to)?;
    }
    Ok(())
}

fn same(one: &std::path::Path, other: &std::path::Path) -> bool {
    matches!((std::fs::read(one), std::fs::read(other)), (Ok(one), Ok(other)) if one == other)
}

/// Runs `cargo test` and adds up the totals that it prints. A run that fails without a failed test counts as one failed test.
fn cargo_test(arguments: &[&str], filter: Option<&str>, total: &mut Total) -> Result<()> {
    let mut test = command(find("cargo").context("cargo is not in PATH")?);
    test.args(["test", "--quiet", "--locked", "--no-fail-fast"]).args(MEMBERS).args(arguments).args([
        "--",
        "--nocapture",
        "--format=pretty",
    ]);
    // Two threads: the tests print figures, and some load the machine.
    counted(test.args(["--test-threads=2"]).args(filter), total)
}

/// Runs a program that prints totals as `cargo test` does, and adds them up.
fn counted(test: &mut Command, total: &mut Total) -> Result<()> {
    let mut child = test.stdout(Stdio::piped()).spawn().context("a test program")?;
    let output = child.stdout.take().context("its output")?;
    let before = total.failed;
    for line in BufReader::new(output).lines() {
        let line = line?;
        say(&line);
        if let Some(result) = line.strip_prefix("test result: ") {
            let count = |what: &str| {
                let end = result.find(what).unwrap_or(0);
                result
                    .get(..end)
                    .and_then(|text| text.split([' ', ';']).rfind(|word| !word.is_empty())?.parse::<usize>().ok())
                    .unwrap_or(0)
            };
            total.passed += count(" passed");
            total.failed += count(" failed");
            total.skipped += count(" ignored");
        } else if line.starts_with("SKIPPED") {
            total.skipped += 1;
            total.passed = total.passed.saturating_sub(1);
        }
    }
    if !child.wait()?.success() && total.failed == before {
        total.failed += 1;
    }
    Ok(())
}
