//! Owns a network namespace with nothing but loopback, for the code of one thread and what it starts.
//! Called by tests and benches of the tunnel that need no lab.
//! Must never resolve a name outside: no packet can leave, and the resolver is told to look at files only.

use std::{io::ErrorKind, path::Path};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::net::ip;

const SWITCH: &str = "/etc/nsswitch.conf";

/// Runs code on a thread of its own, in namespaces of its own (network, mounts); loopback also has these addresses.
pub fn isolated<T: Send>(addresses: &[&str], code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let in_it = || {
        enter(addresses)?;
        code()
    };
    std::thread::scope(|scope| scope.spawn(in_it).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Inside [`isolated`]: from now on names are what this file says.
pub fn hosts(text: &str) -> Result<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let none: Option<&str> = None;
    mount(Some(file.path()), "/etc/hosts", none, MsFlags::MS_BIND, none).context("mount over /etc/hosts")?;
    Ok(file)
}

fn enter(addresses: &[&str]) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "a network namespace of its own needs root");
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("unshare")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("a mount namespace")?;
    if Path::new(SWITCH).is_file() {
        let files = tempfile::NamedTempFile::new()?;
        std::fs::write(files.path(), "hosts: files\n")?;
        mount(Some(files.path()), SWITCH, none, MsFlags::MS_BIND, none).context("mount over nsswitch.conf")?;
    }
    // All agents dial one endpoint: the ports of connections that ended a moment ago are needed again.
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 65000")?;
    std::fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")?;
    ip(&["link", "set", "lo", "up"], "")?;
    addresses.iter().try_for_each(|address| {
        let bits = if address.contains(':') { 128 } else { 32 };
        ip(&["address", "add", &format!("{address}/{bits}"), "dev", "lo"], "")
    })
}

/// Inside [`isolated`]: TCP as most machines have it, which does not pace; where the machine's default does (BBR), a timer for every 64 KiB is a
/// third of what an agent in a virtual machine works. CUBIC, or Reno where a namespace may not have that; which.
pub fn without_pacing() -> Result<String> {
    let control = Path::new("/proc/sys/net/ipv4/tcp_congestion_control");
    for name in ["cubic", "reno"] {
        match std::fs::write(control, name) {
            Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::NotFound) => {}
            written => {
                written.with_context(|| format!("{name} > {}", control.display()))?;
                return Ok(name.to_owned());
            }
        }
    }
    bail!("neither CUBIC nor Reno can be had: {}", control.display())
}

/// Does something with the sysfs of the calling thread's network namespace, which no mount of the machine shows.
pub fn with_sysfs<T: Send>(work: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    let in_it = || {
        unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("a mount namespace")?;
        let directory = tempfile::tempdir()?;
        mount(Some("sysfs"), directory.path(), Some("sysfs"), MsFlags::empty(), none).context("mount -t sysfs")?;
        let result = work(directory.path());
        nix::mount::umount2(directory.path(), nix::mount::MntFlags::MNT_DETACH)?;
        result
    };
    std::thread::scope(|scope| scope.spawn(in_it).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
