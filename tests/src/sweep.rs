//! Owns removing labs: one that ends, and what killed runs left behind.
//! Called by `lab`.
//! Must never touch a lab whose owner lives.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};

use crate::lab::net;

/// Where every lab has its directory, named by the owner's process id and start time.
pub const LABS: &str = "/run/nodeguard-lab";

/// Removes the labs of owners that are gone.
pub fn stale() {
    for entry in fs::read_dir(LABS).into_iter().flatten().flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        let mut parts = id.split('-');
        let owner = parts.next().and_then(|pid| pid.parse::<u32>().ok()).zip(parts.next());
        if owner.is_none_or(|(pid, started)| start_time(pid).as_deref() != Some(started)) {
            remove(&id);
        }
    }
}

/// Removes a lab, whatever is there of it.
pub fn remove(id: &str) {
    // The second version first: it ends what lives in the others too.
    for root in hierarchies() {
        remove_cgroup(&cgroup(&root, id));
    }
    net::remove(id);
    let directory = Path::new(LABS).join(id);
    let _ = umount2(&directory.join("bpf"), MntFlags::MNT_DETACH);
    let _ = fs::remove_dir_all(&directory);
}

/// The cgroup of a lab in a hierarchy.
pub fn cgroup(root: &Path, id: &str) -> PathBuf {
    root.join(format!("nodeguard-lab-{id}"))
}

/// What the names of this process's labs begin with.
pub fn own_name() -> Result<String> {
    let pid = std::process::id();
    Ok(format!("{pid}-{}", start_time(pid).context("/proc/self/stat")?))
}

/// Where the cgroup hierarchies are mounted, version 2 first.
pub fn hierarchies() -> Vec<PathBuf> {
    mounted().into_iter().map(|(path, ..)| path).collect()
}

/// The same with the type of each, and the controllers of the first version (proc(5), "mountinfo").
pub fn mounted() -> Vec<(PathBuf, String, Option<String>)> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let [kind, _, options] = filesystem.split(' ').collect::<Vec<_>>()[..] else { return None };
        let controllers = options.split(',').filter(|option| !["rw", "ro"].contains(option)).collect::<Vec<_>>();
        let controllers = (kind == "cgroup").then(|| controllers.join(","));
        let path = PathBuf::from(mount.split(' ').nth(4)?);
        kind.starts_with("cgroup").then(|| (path, kind.to_owned(), controllers))
    };
    let mut mounts: Vec<_> = table.lines().filter_map(mount).collect();
    mounts.sort_by_key(|(_, kind, _)| kind == "cgroup");
    mounts
}

/// When a process started, in ticks since boot: with its id, a name that is never used twice.
pub fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the start time is field 22 (proc(5)).
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}

/// Ends every process in it (only the lab's own are), then removes it.
fn remove_cgroup(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    for _ in 0..100 {
        if !cgroup.exists() || fs::remove_dir(cgroup).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
