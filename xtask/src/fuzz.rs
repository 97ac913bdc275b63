//! Owns the soak of the fuzz targets: each runs for a minute.
//! Called by `test` for the unit area of a soak.
//! Must never count a target as passed that did not run.

use std::{fs, time::Duration};

use anyhow::{Context, Result};

use crate::{
    setup,
    shell::{command, find, read, root, run, say},
    tools::CARGO_FUZZ,
};

/// How long each target runs.
const TIME: Duration = Duration::from_secs(60);

/// How many targets passed, failed and were skipped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

/// Runs every target for a minute. Without a nightly toolchain of rustup, all of them are skipped.
pub(crate) fn soak() -> Result<Outcome> {
    let targets = targets()?;
    let mut outcome = Outcome::default();
    if let Some(reason) = missing() {
        targets.iter().for_each(|target| say(format!("SKIPPED fuzz {target}: {reason}")));
        return Ok(Outcome { skipped: targets.len(), ..outcome });
    }
    setup::package("c++", "g++")?;
    CARGO_FUZZ.install()?;
    for target in targets {
        let mut fuzz = command("rustup");
        fuzz.args(["run", "nightly", "cargo", "fuzz", "run", &target, "--"]);
        // An input that takes longer than ten seconds is a finding, too.
        fuzz.args([&format!("-max_total_time={}", TIME.as_secs()), "-timeout=10", "-print_final_stats=1"]);
        match run(fuzz.env_remove("RUSTUP_TOOLCHAIN")) {
            Ok(()) => {
                say(format!("fuzz {target} ... ok"));
                outcome.passed += 1;
            }
            Err(error) => {
                say(format!("fuzz {target} ... FAILED\n{error:#}"));
                outcome.failed += 1;
            }
        }
    }
    Ok(outcome)
}

/// The targets, by their files.
fn targets() -> Result<Vec<String>> {
    let folder = root().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let name = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_suffix(".rs")?.to_owned());
    let mut targets: Vec<String> = entries.flatten().filter_map(name).collect();
    targets.sort();
    Ok(targets)
}

/// Why the targets cannot run, if they cannot.
fn missing() -> Option<&'static str> {
    let Some(rustup) = find("rustup") else {
        return Some("libFuzzer needs a nightly toolchain, and there is no rustup");
    };
    let toolchains = read(command(rustup).args(["toolchain", "list"])).unwrap_or_default();
    let nightly = toolchains.lines().any(|line| line.starts_with("nightly-") || line == "nightly");
    (!nightly).then_some("libFuzzer needs a nightly toolchain: run `rustup toolchain install nightly`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_a_file_and_a_binary_of_the_package() {
        let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).expect("a manifest");
        let targets = targets().expect("targets");
        assert!(!targets.is_empty());
        for target in &targets {
            assert!(
                manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")),
                "{target} is not in fuzz/Cargo.toml"
            );
        }
        assert_eq!(manifest.matches("[[bin]]").count(), targets.len());
    }
}
