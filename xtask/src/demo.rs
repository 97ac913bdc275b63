//! Owns `cargo xtask demo`: all set-up, then the lab with a running guard.
//! Called as `cargo xtask demo [--stay]`.
//! Must never say less than the lab found: its exit code is the task's.

use anyhow::{Context, Result};

use crate::{
    setup,
    shell::{command, find, root, run, say},
};

/// Sets up, builds, and runs the demo.
pub(crate) fn demo(stay: bool) -> Result<()> {
    setup::root_or_say("demo")?;
    setup::setup(setup::For::Lab)?;
    say("building the guard and the lab (a few minutes the first time)");
    let cargo = find("cargo").context("cargo is not in PATH")?;
    let mut build = command(cargo);
    run(build.args([
        "build",
        "--quiet",
        "--locked",
        "--package",
        "nodeguard",
        "--package",
        "nodeguard-tests",
        "--bins",
    ]))?;
    let mut demo = command(root().join("target/debug/nodeguard-demo"));
    if stay {
        demo.arg("--stay");
    }
    run(&mut demo)
}
