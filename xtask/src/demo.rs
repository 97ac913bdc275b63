//! Owns `cargo xtask demo`: all set-up, then the lab with a running guard.
//! Called as `cargo xtask demo [--cluster] [--stay]`, and by the cluster area of `test`.
//! Must never say less than the lab found: its exit code is the task's.

use anyhow::{Context, Result};

use crate::{
    image, setup,
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

/// The cluster lab, its checks once; it is left running where somebody wants to try it.
pub(crate) fn cluster(stay: bool) -> Result<()> {
    setup::root_or_say("demo --cluster")?;
    let mut lab = cluster_lab()?;
    if stay {
        lab.arg("--stay");
    }
    run(&mut lab)
}

/// Everything that the cluster lab needs, and the command that runs it.
pub(crate) fn cluster_lab() -> Result<std::process::Command> {
    setup::setup(setup::For::Cluster)?;
    say("building the guard's image and the lab (a few minutes the first time)");
    image::guard()?;
    let mut build = command(find("cargo").context("cargo is not in PATH")?);
    run(build.args(["build", "--quiet", "--locked", "--package", "nodeguard-tests", "--bin", "nodeguard-cluster"]))?;
    Ok(command(root().join("target/debug/nodeguard-cluster")))
}
