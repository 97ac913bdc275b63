//! Owns what the guard of a lab may do: all that root may, or three capabilities and nothing else.
//! Called by `daemon` when it starts the guard.
//! Must never leave more than it says: what the bounding set lacks, nothing brings back.

use std::{fs, os::unix::fs::chown, path::Path};

use anyhow::{Context, Result};

/// What a guard may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rights {
    /// Everything.
    #[default]
    Root,
    /// `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_PERFMON`, as a user of its own that can gain nothing more.
    Three,
}

/// The user that images without a root have.
pub const USER: u32 = 65_532;

/// Only these capabilities, for `setpriv`.
const ONLY: &str = "-all,+bpf,+net_admin,+perfmon";

impl Rights {
    /// The program and its arguments that start another program with these rights; none where nothing is to change.
    pub fn starter(self) -> Option<(&'static Path, Vec<String>)> {
        let user = ["reuid", "regid"].map(|option| format!("--{option}={USER}"));
        let sets = ["bounding-set", "inh-caps", "ambient-caps"].map(|option| format!("--{option}={ONLY}"));
        let other = ["--clear-groups", "--no-new-privs"].map(str::to_owned);
        (self == Rights::Three).then(|| (Path::new("/usr/bin/setpriv"), [&user[..], &sets, &other].concat()))
    }

    /// Gives the guard of a lab the files that it works with.
    pub fn own(self, path: &Path) -> Result<()> {
        if self == Rights::Root {
            return Ok(());
        }
        chown(path, Some(USER), Some(USER)).with_context(|| path.display().to_string())?;
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                self.own(&entry?.path())?;
            }
        }
        Ok(())
    }
}
