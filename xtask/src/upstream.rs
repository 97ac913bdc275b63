//! Owns building the real proxy-server from its Go module.
//! Called by `setup`; the lab starts what this leaves in `target/upstream`.
//! Must never build from anything but the versions that tests/upstream/go.sum pins.

use std::fs;

use anyhow::{Context, Result};

use crate::shell::{command, find, read, root, run, say};

const PACKAGE: &str = "sigs.k8s.io/apiserver-network-proxy/cmd/server";

/// Builds the proxy-server, unless the one that is there was built from the same module file.
pub(crate) fn proxy_server() -> Result<()> {
    let module = root().join("tests/upstream");
    let output = root().join("target/upstream");
    let (binary, built_from) = (output.join("proxy-server"), output.join("proxy-server.go.sum"));
    let sums = fs::read(module.join("go.sum")).context("tests/upstream/go.sum")?;
    if binary.is_file() && fs::read(&built_from).ok().as_ref() == Some(&sums) {
        return Ok(());
    }
    say("  proxy-server v0.36.0 (a Go build of one to three minutes)");
    fs::create_dir_all(&output)?;
    let go = find("go").context("Go is not installed")?;
    let mut build = command(go);
    build.current_dir(&module).env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=readonly");
    run(build.args(["build", "-trimpath", "-ldflags=-s -w", "-o"]).arg(&binary).arg(PACKAGE))?;
    // The binary has to start: a broken build is found here, not in a lab.
    read(command(&binary).arg("--help"))?;
    fs::write(built_from, sums)?;
    Ok(())
}
