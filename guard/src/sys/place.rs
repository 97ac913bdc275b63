//! Owns what shows that this process is in a place from which it cannot guard the whole machine.
//! Called by `daemon/run` at its start.
//! Must never take what cannot be read for a sign: in a process namespace of its own, the first process says nothing about the machine.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

/// The inode of the root of every cgroup v2 hierarchy. A cgroup below it has another one, also if a cgroup namespace shows it as `/`.
const ROOT: u64 = 1;

/// A file of a network namespace, of this process and of the first one. Its inode is the namespace's own (`proc_net`), and unlike `ns/net` it
/// needs no right to trace the other process.
const OWN: &str = "/proc/self/net/dev";
const FIRST: &str = "/proc/1/net/dev";

/// Where this process is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The first process is in another network namespace: the ports of the node are not the machine's.
    pub other_network_namespace: bool,
    /// The guarded cgroup is below the root of the hierarchy: sockets outside of it are not guarded.
    pub cgroup_below_root: bool,
}

impl Place {
    /// Reads it, for the cgroup that is guarded.
    pub fn read(cgroup: &Path) -> Place {
        Place {
            other_network_namespace: differ(Path::new(OWN), Path::new(FIRST)).unwrap_or(false),
            cgroup_below_root: is_below_root(cgroup).unwrap_or(false),
        }
    }
}

/// Whether two files are different ones.
fn differ(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (fs::metadata(one)?, fs::metadata(other)?);
    Ok((one.dev(), one.ino()) != (other.dev(), other.ino()))
}

/// Whether a cgroup v2 directory is not the root of the hierarchy.
pub(crate) fn is_below_root(cgroup: &Path) -> io::Result<bool> {
    Ok(fs::metadata(cgroup)?.ino() != ROOT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_namespace_is_told_by_its_file() {
        let own = Path::new(OWN);
        assert!(!differ(own, Path::new("/proc/thread-self/net/dev")).unwrap());
        assert!(differ(own, Path::new("/proc/self/net/route")).unwrap());
        assert!(differ(own, Path::new("/nonexistent")).is_err());
    }
}
