//! Owns what else holds a list of prefixes in the kernel: a set of nftables, an ipset.
//! Called by `edit`.
//! Must never touch a network namespace but one of its own.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::isolated::isolated;

/// What loading the prefixes into a set of nftables takes; `None` where there is no `nft` or the kernel has no such sets.
pub(crate) fn load_set(nets: &[IpNet]) -> Result<Option<Duration>> {
    let text = format!(
        "table ip bench {{\nset allowed {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {} }}; }}\n}}\n",
        list(nets)
    );
    isolated(&[], || {
        if nft("table ip probe {\nset s { type ipv4_addr; flags interval; }\n}\n").is_err() {
            return Ok(None);
        }
        let started = Instant::now();
        nft(&text)?;
        Ok(Some(started.elapsed()))
    })
}

/// What the kernel says that an ipset of these prefixes takes; `None` where there is no ipset.
pub(crate) fn ipset_bytes(nets: &[IpNet]) -> Result<Option<f64>> {
    isolated(&[], || {
        if run("ipset", &["restore"], &ipset_text(nets)).is_err() {
            return Ok(None);
        }
        let said = output("ipset", &["list", "-t", "allowed"], "")?;
        Ok(said.lines().find_map(|line| line.strip_prefix("Size in memory:")?.trim().parse().ok()))
    })
}

fn list(nets: &[IpNet]) -> String {
    nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

fn ipset_text(nets: &[IpNet]) -> String {
    let mut text = format!("create allowed hash:net family inet maxelem {}\n", nets.len().max(65_536));
    for net in nets {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "add allowed {net}");
    }
    text
}

fn nft(text: &str) -> Result<()> {
    run("nft", &["-f", "-"], text)
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    output(program, arguments, input).map(drop)
}

fn output(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| program.to_owned())?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
