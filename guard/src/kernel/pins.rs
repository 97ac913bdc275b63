//! Owns the paths of pins.
//! Called by everything that opens, creates or removes a pin, and by `cli/config`.
//! Must never depend on what is pinned there.

use std::path::{Path, PathBuf};

use guard_common::abi::ABI;

/// Where the kernel half is attached and pinned.
#[derive(Clone, Debug)]
pub struct Location {
    /// The cgroup v2 directory that the programs attach to: the root of the hierarchy covers the whole node.
    pub cgroup: PathBuf,
    /// The directory on a bpf file system below which everything is pinned, in [`Location::pins`].
    pub bpffs: PathBuf,
}

impl Location {
    /// The versioned pin directory.
    pub fn pins(&self) -> PathBuf {
        pins(&self.bpffs)
    }
}

/// The pin directory of this build's ABI below `--bpffs`.
pub fn pins(bpffs: &Path) -> PathBuf {
    bpffs.join(format!("v{ABI}"))
}
