//! Owns building what tests need of the upstream project from its Go module: proxy-server, agent, test suite.
//! Called by `setup`; the lab starts what this leaves in `target/upstream`.
//! Must never build from anything but the versions that tests/upstream/go.sum pins.

use std::fs;

use anyhow::{Context, Result};

use crate::shell::{command, find, read, root, run, say};

const MODULE: &str = "sigs.k8s.io/apiserver-network-proxy";

/// A file of `target/upstream`, how Go makes it, and its package.
const PROXY_SERVER: [(&str, &[&str], &str); 1] = [("proxy-server", &["build"], "cmd/server")];
const OTHERS: [(&str, &[&str], &str); 2] =
    [("proxy-agent", &["build"], "cmd/agent"), ("integration.test", &["test", "-c"], "tests")];

/// The proxy-server alone: what a lab needs.
pub(crate) fn proxy_server() -> Result<()> {
    PROXY_SERVER.iter().try_for_each(|(file, how, package)| build(file, how, package))
}

/// What the tests and the bench compare with: the upstream agent and the upstream project's integration suite.
pub(crate) fn agent_and_suite() -> Result<()> {
    OTHERS.iter().try_for_each(|(file, how, package)| build(file, how, package))
}

/// Builds one, unless the one that is there was built from the same module file.
fn build(file: &str, how: &[&str], package: &str) -> Result<()> {
    let module = root().join("tests/upstream");
    let output = root().join("target/upstream");
    let (binary, built_from) = (output.join(file), output.join(format!("{file}.go.sum")));
    let sums = fs::read(module.join("go.sum")).context("tests/upstream/go.sum")?;
    if binary.is_file() && fs::read(&built_from).ok().as_ref() == Some(&sums) {
        return Ok(());
    }
    say(format!("  {file} v0.36.0 (a Go build of one to three minutes)"));
    fs::create_dir_all(&output)?;
    let go = find("go").context("Go is not installed")?;
    let mut build = command(go);
    build.current_dir(&module).env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=readonly");
    build.args(how).args(["-trimpath", "-ldflags=-s -w", "-o"]).arg(&binary);
    run(build.arg(format!("{MODULE}/{package}")))?;
    // The binary has to start: a broken build is found here, not in a lab. A test binary ends badly after its help.
    if how == ["build"] {
        read(command(&binary).arg("--help"))?;
    }
    fs::write(built_from, sums)?;
    Ok(())
}
