//! Owns a network namespace with nothing but loopback, for the code of one thread and what it starts.
//! Called by tests and benches of the tunnel that need no lab.
//! Must never resolve a name outside: no packet can leave, and the resolver reads files only.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use tempfile::NamedTempFile;

use crate::lab::net::{ip, on_a_thread};

/// Runs code on a thread of its own, in namespaces of its own (network, mounts); loopback also has these addresses.
pub fn isolated<T: Send>(addresses: &[&str], code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    ensure!(nix::unistd::geteuid().is_root(), "a network namespace of its own needs root");
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
        own_mounts()?;
        if Path::new("/etc/nsswitch.conf").is_file() {
            replace("/etc/nsswitch.conf", "hosts: files\n")?;
        }
        // All agents dial one endpoint: the ports of connections that ended a moment ago are needed again.
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 65000")?;
        fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")?;
        // IPv4 by local routes: no interface has these addresses, so an agent does not take them for its node's own. IPv6 cannot be bound so.
        let added = addresses.iter().map(|address| {
            if address.contains(':') {
                format!("address add {address}/128 dev lo\n")
            } else {
                format!("route add local {address}/32 dev lo\n")
            }
        });
        ip(&["-batch", "-"], &("link set lo up\n".to_owned() + &added.collect::<String>()))?;
        code()
    })
}

/// Inside [`isolated`]: from now on names are what this file says.
pub fn hosts(text: &str) -> Result<NamedTempFile> {
    replace("/etc/hosts", text)
}

/// Puts a file with this text over another one; the mount keeps it when the returned name is gone.
fn replace(path: &str, text: &str) -> Result<NamedTempFile> {
    let file = NamedTempFile::new()?;
    fs::write(file.path(), text)?;
    mount(Some(file.path()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mount over {path}"))?;
    Ok(file)
}

fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("a mount namespace")
}

/// Inside [`isolated`]: sets a congestion control without pacing and returns its name. The timers of BBR cost an agent a third of its work in
/// a virtual machine. CUBIC is used if a namespace may have it, otherwise Reno.
pub fn without_pacing() -> Result<String> {
    let control = Path::new("/proc/sys/net/ipv4/tcp_congestion_control");
    for name in ["cubic", "reno"] {
        match fs::write(control, name) {
            Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::NotFound) => {}
            written => {
                written.with_context(|| format!("{name} > {}", control.display()))?;
                return Ok(name.to_owned());
            }
        }
    }
    bail!("neither CUBIC nor Reno can be set: {}", control.display())
}

/// Runs code with the sysfs of the calling thread's network namespace, which no mount of the machine shows.
pub fn with_sysfs<T: Send>(code: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    on_a_thread(|| {
        own_mounts()?;
        let directory = tempfile::tempdir()?;
        mount(Some("sysfs"), directory.path(), Some("sysfs"), MsFlags::empty(), None::<&str>)
            .context("mount -t sysfs")?;
        let result = code(directory.path());
        umount2(directory.path(), MntFlags::MNT_DETACH)?;
        result
    })
}
