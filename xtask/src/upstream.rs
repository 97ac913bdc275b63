//! Owns building what tests need of the upstream project from its Go module: proxy-server, agent, test suite.
//! Called by `setup`; the lab starts what this leaves in `target/upstream`.
//! Must never build from anything but the versions that the go.sum of tests/upstream and of tests/upstream-v* pin.

use std::fs;

use anyhow::{Context, Result};

use crate::shell::{command, find, read, root, run, say};

const MODULE: &str = "sigs.k8s.io/apiserver-network-proxy";

/// A file of `target/upstream`, how Go makes it, and its package.
const PROXY_SERVER: [(&str, &[&str], &str); 1] = [("proxy-server", &["build"], "cmd/server")];
const OTHERS: [(&str, &[&str], &str); 2] =
    [("proxy-agent", &["build"], "cmd/agent"), ("integration.test", &["test", "-c"], "tests")];

/// The newest release, and the older ones whose proxy-server the agent is tried with: the oldest two minors that still build as a module with
/// Go 1.26 (of v0.0 and v0.1, these tags can be had), and one between.
const NEWEST: &str = "v0.36.0";
const OLD: [&str; 3] = ["v0.0.37", "v0.1.2", "v0.29.0"];

/// The proxy-server alone: what a lab needs.
pub(crate) fn proxy_server() -> Result<()> {
    PROXY_SERVER.iter().try_for_each(|(file, how, package)| build("upstream", NEWEST, file, how, package))
}

/// The upstream agent alone.
pub(crate) fn agent() -> Result<()> {
    OTHERS
        .iter()
        .filter(|(file, ..)| *file == "proxy-agent")
        .try_for_each(|(file, how, package)| build("upstream", NEWEST, file, how, package))
}

/// What the tests and the bench compare with: the upstream agent, the upstream project's integration suite, proxy-servers of old releases.
pub(crate) fn agent_and_suite() -> Result<()> {
    OTHERS.iter().try_for_each(|(file, how, package)| build("upstream", NEWEST, file, how, package))?;
    OLD.iter().try_for_each(|version| {
        let (module, file) = (format!("upstream-{version}"), format!("proxy-server-{version}"));
        build(&module, version, &file, &["build"], "cmd/server")
    })
}

/// Builds one, unless the one that is there was built from the same module file.
fn build(module: &str, version: &str, file: &str, how: &[&str], package: &str) -> Result<()> {
    let module = root().join("tests").join(module);
    let output = root().join("target/upstream");
    let (binary, built_from) = (output.join(file), output.join(format!("{file}.go.sum")));
    let sums = fs::read(module.join("go.sum")).with_context(|| module.display().to_string())?;
    if binary.is_file() && fs::read(&built_from).ok().as_ref() == Some(&sums) {
        return Ok(());
    }
    say(format!("  {file} {version} (a Go build of one to three minutes)"));
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
