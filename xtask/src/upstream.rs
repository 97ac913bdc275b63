//! Owns building the programs of the upstream project that the tests need: proxy-server, agent, integration suite.
//! Called by `setup`; the lab starts what this leaves in `target/upstream`.
//! Must never build other versions than those that the go.sum of tests/upstream and of tests/upstream-v* pin.

use std::fs;

use anyhow::{Context, Result};

use crate::shell::{command, find, read, root, run, say};

const MODULE: &str = "sigs.k8s.io/apiserver-network-proxy";

/// A file of `target/upstream`, the Go command that makes it, and its package.
const PROXY_SERVER: [(&str, &[&str], &str); 1] = [("proxy-server", &["build"], "cmd/server")];
const OTHERS: [(&str, &[&str], &str); 2] =
    [("proxy-agent", &["build"], "cmd/agent"), ("integration.test", &["test", "-c"], "tests")];

/// The newest release, and the older ones whose proxy-server the agent is tested with: the two oldest minor versions that still build as a
/// module with Go 1.26 (for v0.0 and v0.1, these tags are available), and one in between.
const NEWEST: &str = "v0.36.0";
const OLD: [&str; 3] = ["v0.0.37", "v0.1.2", "v0.29.0"];

/// Builds the proxy-server, which every lab needs.
pub(crate) fn proxy_server() -> Result<()> {
    PROXY_SERVER.iter().try_for_each(|(file, how, package)| build("upstream", NEWEST, file, how, package))
}

/// Builds the upstream agent.
pub(crate) fn agent() -> Result<()> {
    OTHERS
        .iter()
        .filter(|(file, ..)| *file == "proxy-agent")
        .try_for_each(|(file, how, package)| build("upstream", NEWEST, file, how, package))
}

/// Builds what the tests and the bench compare with: the upstream agent, the upstream integration suite, and proxy-servers of old releases.
pub(crate) fn agent_and_suite() -> Result<()> {
    OTHERS.iter().try_for_each(|(file, how, package)| build("upstream", NEWEST, file, how, package))?;
    OLD.iter().try_for_each(|version| {
        let (module, file) = (format!("upstream-{version}"), format!("proxy-server-{version}"));
        build(&module, version, &file, &["build"], "cmd/server")
    })
}

/// Builds one file, unless the existing one was built from the same module file.
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
    // If the binary does not start, fail here and not in a lab. A test binary exits with an error after its help.
    if how == ["build"] {
        read(command(&binary).arg("--help"))?;
    }
    fs::write(built_from, sums)?;
    Ok(())
}
