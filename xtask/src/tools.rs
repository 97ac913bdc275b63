//! Owns the tools of crates.io that the tasks use, each at a fixed version.
//! Called by `setup`, and by the tasks that cannot wait for it.
//! Must never run a version other than the one named here.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::shell::{command, find, read, run, say};

/// A program that `cargo install` installs, in a package of the same name.
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// Whether it is worth the minutes that its release profile takes: what runs for a second is built in half the time without.
    pub(crate) optimised: bool,
}

/// Runs fuzz targets.
pub(crate) const CARGO_FUZZ: Tool = Tool { name: "cargo-fuzz", version: "0.13.2", optimised: false };
/// Makes a bill of materials from the lock file.
pub(crate) const CARGO_CYCLONEDX: Tool = Tool { name: "cargo-cyclonedx", version: "0.5.9", optimised: false };
/// Checks licences, sources and bans.
pub(crate) const CARGO_DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2", optimised: false };
/// Finds dependencies that no source file names.
pub(crate) const CARGO_MACHETE: Tool = Tool { name: "cargo-machete", version: "0.9.2", optimised: false };

impl Tool {
    /// Installs the tool unless this version of it is there.
    pub(crate) fn install(&self) -> Result<()> {
        let Tool { name, version, .. } = self;
        // Some subcommands of cargo know their version only when cargo calls them.
        let version_of = |path: PathBuf| match name.strip_prefix("cargo-") {
            Some(subcommand) => read(command(find("cargo")?).args([subcommand, "--version"])).ok(),
            None => read(command(path).arg("--version")).ok(),
        };
        let installed = find(name).and_then(version_of).unwrap_or_default();
        if installed.split(' ').any(|word| word.trim_start_matches('v') == *version) {
            return Ok(());
        }
        say(format!("  cargo install {name} --version {version} --locked (a few minutes)"));
        let mut install = command(find("cargo").context("cargo is not in PATH")?);
        if !self.optimised {
            let profile = [("LTO", "off"), ("OPT_LEVEL", "1"), ("CODEGEN_UNITS", "16"), ("STRIP", "symbols")];
            install.envs(profile.map(|(key, value)| (format!("CARGO_PROFILE_RELEASE_{key}"), value)));
        }
        run(install.args(["install", "--quiet", "--locked", "--force", name, "--version", version]))
    }
}
