//! Owns starting the server that traffic is measured with, in the node of a lab.
//! Called by `wire` and `flood`; the server is this program again: `nodeguard-kernel-bench serve ADDRESS`.
//! Must never start it in the measuring process: it would share its processor and its cgroup.

use std::{path::Path, process::Command, time::Duration};

use anyhow::Result;
pub(crate) use lab::traffic::{Ask, Conversation, NODE_CPU, OTHER_CPU, connections, pin, serve};
use lab::{
    lab::Lab,
    net::Who,
    process::{Process, command, until},
};

/// Starts the server in the node, in a cgroup, and waits until it listens. With precedence nothing ordinary disturbs it.
pub(crate) fn start(lab: &Lab, cgroup: &Path, port: u16, precedence: bool) -> Result<Process> {
    let mut serve: Command = command(&std::env::current_exe()?, lab.net.open(Who::Node)?, cgroup)?;
    serve.args(["serve", &format!("0.0.0.0:{port}")]).args(precedence.then_some("--precedence"));
    let mut process = Process::start("server", serve, &lab.directory.join(format!("serve-{port}.log")))?;
    until("the server listens", Duration::from_secs(10), || {
        process.check()?;
        Ok(process.printed().contains("ready"))
    })?;
    Ok(process)
}
