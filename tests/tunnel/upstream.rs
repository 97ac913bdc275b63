//! The upstream project's own integration suite, with its agent and with ours: whatever its agent passes, ours passes.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use lab::{bare::upstream, daemon::binary, net::isolated, process::Process};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// Left out always: it dials an address outside any lab.
const NEVER: &str = "AgentTimeout";
/// Left out but in a soak: it takes a minute with any agent.
const LONG: &str = "RequestCancelled_Concurrent";
const PATIENCE: Duration = Duration::from_secs(300);

#[test]
fn the_upstream_suite_passes_with_our_agent_where_it_passes_with_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let theirs = upstream("proxy-agent").unwrap();
    let ours = directory.path().join("nodeguard-agent");
    // The suite starts a program with flags alone, and its servers are on loopback.
    let script = format!("#!/bin/sh\nexec {} agent --dial-anything \"$@\"\n", binary().unwrap().display());
    std::fs::write(&ours, script).unwrap();
    std::fs::set_permissions(&ours, std::fs::Permissions::from_mode(0o755)).unwrap();
    let soak = crate::soak();
    let skip = if soak { NEVER.to_owned() } else { format!("{NEVER}|{LONG}") };

    let with_theirs = run(&theirs, directory.path(), &["-test.skip", &skip]);
    let with_ours = run(&ours, directory.path(), &["-test.skip", &skip]);
    let passed = |results: &BTreeMap<String, bool>| results.values().filter(|passed| **passed).count();
    assert!(passed(&with_theirs) >= 20, "the suite does not work here: {with_theirs:?}");
    let mut worse = Vec::new();
    for name in with_theirs.iter().filter_map(|(name, passed)| passed.then_some(name)) {
        if with_ours.get(name) == Some(&true) {
            continue;
        }
        // Its tests wait for fixed times; one that fails on a busy machine has a second try, alone.
        let pattern = format!("^{}$", name.replace('/', "$/^"));
        let again = run(&ours, directory.path(), &["-test.run", &pattern]);
        println!("upstream: {name} failed at first, alone: {again:?}");
        if again.get(name) != Some(&true) {
            worse.push(name);
        }
    }
    println!("upstream: {} passed with the Go agent, {} with ours", passed(&with_theirs), passed(&with_ours));
    assert!(worse.is_empty(), "passed with the Go agent and not with ours: {worse:?}");
}

/// Each test's name, and whether it passed.
fn run(agent: &Path, directory: &Path, which: &[&str]) -> BTreeMap<String, bool> {
    let log = directory.join("suite.log");
    File::create(&log).unwrap();
    let printed = isolated(&[], || {
        let mut suite = Command::new(upstream("integration.test")?);
        suite
            .current_dir(directory)
            .stdin(Stdio::null())
            .process_group(0)
            .args(["-test.v", "-agent-path"])
            .arg(agent)
            .args(which);
        let mut process = Process::start("the upstream suite", suite, &log)?;
        let ended = process.wait(PATIENCE);
        // Agents that it did not end are in its process group.
        let _ = killpg(Pid::from_raw(i32::try_from(process.id())?), Signal::SIGKILL);
        ended?;
        Ok(process.printed())
    })
    .unwrap();
    let result = |line: &str| {
        let line = line.trim_start();
        let (passed, rest) = match line.strip_prefix("--- PASS: ") {
            Some(rest) => (true, rest),
            None => (false, line.strip_prefix("--- FAIL: ")?),
        };
        Some((rest.split(' ').next()?.to_owned(), passed))
    };
    printed.lines().filter_map(result).collect()
}
