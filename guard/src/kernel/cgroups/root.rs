//! Owns finding the cgroup v2 hierarchy.
//! Called by `cli/config` to resolve `--cgroup`, and by `kernel/cut`.
//! Must never assume /sys/fs/cgroup: on a hybrid host that is cgroup v1, and attaching there fails with EBADF.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::sys::place::is_below_root;

/// Why no cgroup v2 hierarchy was found.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The mount table could not be read.
    #[error("cannot read /proc/self/mountinfo")]
    MountInfo(#[source] io::Error),
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one (`mount -t cgroup2 none /sys/fs/cgroup/unified`), or name its directory with --cgroup"
    )]
    NotMounted,
}

/// Finds the mount point of the cgroup v2 hierarchy, whose root contains every socket of the node. If the root is mounted nowhere, this is a mount
/// of a part of it.
pub fn v2_root() -> Result<PathBuf, CgroupError> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::MountInfo)?;
    let mounts: Vec<PathBuf> = v2_mounts(&table).collect();
    let root = mounts.iter().find(|mount| is_below_root(mount).is_ok_and(|below| !below));
    root.or(mounts.first()).cloned().ok_or(CgroupError::NotMounted)
}

/// The cgroup2 mounts of a mount table (proc(5), "mountinfo": the mount point is field 5, the type follows the ` - `).
fn v2_mounts(table: &str) -> impl Iterator<Item = PathBuf> {
    table.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        (filesystem.split(' ').next() == Some("cgroup2"))
            .then(|| mount.split(' ').nth(4))
            .flatten()
            .map(|path| Path::new(&path.replace("\\040", " ")).to_path_buf())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_host_has_it_below_the_v1_tree() {
        let table = "30 25 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                     31 30 0:28 / /sys/fs/cgroup/cpu rw shared:1 - cgroup cgroup rw,cpu\n\
                     40 30 0:36 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(v2_mounts(table).collect::<Vec<_>>(), [PathBuf::from("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn v1_only_host_has_none() {
        assert_eq!(v2_mounts("31 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n").count(), 0);
    }
}
