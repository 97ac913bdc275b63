//! Owns what the guard of a lab may do: all that root may, or three capabilities and nothing else.
//! Called by `daemon` before it starts the guard, and by `lab`, which gives it its files.
//! Must never leave more than it says: what the bounding set lacks, nothing brings back.

use std::{
    fs, io,
    os::unix::{fs::chown, process::CommandExt},
    path::Path,
    process::Command,
};

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

/// The user: the one of images without a root.
pub const USER: u32 = 65_532;

/// `CAP_NET_ADMIN`, `CAP_PERFMON`, `CAP_BPF` (capability.h).
const CAPABILITIES: [u32; 3] = [12, 38, 39];
/// The last capability that there is (`CAP_CHECKPOINT_RESTORE`).
const LAST: u32 = 40;

impl Rights {
    /// Has a command start with these rights.
    pub fn give(self, command: &mut Command) {
        if self == Rights::Three {
            // SAFETY: between fork and exec only system calls are made, on what lives on the stack.
            unsafe { command.pre_exec(drop_all_but_three) };
        }
    }

    /// Gives the guard of a lab the files that it works with.
    pub fn own(self, directory: &Path) -> Result<()> {
        if self == Rights::Three { own_all(directory) } else { Ok(()) }
    }
}

fn own_all(path: &Path) -> Result<()> {
    chown(path, Some(USER), Some(USER)).with_context(|| path.display().to_string())?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            own_all(&entry?.path())?;
        }
    }
    Ok(())
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn drop_all_but_three() -> io::Result<()> {
    let result = |code: libc::c_long| if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    let prctl = |option: libc::c_int, first: libc::c_ulong, second: libc::c_ulong| {
        // SAFETY: these options take numbers alone.
        result(unsafe { libc::prctl(option, first, second, 0, 0) }.into())
    };
    for capability in (0..=LAST).filter(|capability| !CAPABILITIES.contains(capability)) {
        prctl(libc::PR_CAPBSET_DROP, capability.into(), 0)?;
    }
    prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
    // SAFETY: no groups, and numbers; the raw calls, for this thread alone.
    unsafe {
        result(libc::syscall(libc::SYS_setgroups, 0, 0))?;
        result(libc::syscall(libc::SYS_setresgid, USER, USER, USER))?;
        result(libc::syscall(libc::SYS_setresuid, USER, USER, USER))?;
    }
    let of_word = |word: u32| {
        let mask = CAPABILITIES.iter().filter(|bit| *bit / 32 == word).fold(0, |mask, bit| mask | 1u32 << (bit % 32));
        Sets { effective: mask, permitted: mask, inheritable: mask }
    };
    // `_LINUX_CAPABILITY_VERSION_3`: two words a set.
    let (header, sets) = (Header { version: 0x2008_0522, pid: 0 }, [of_word(0), of_word(1)]);
    // SAFETY: both live through the call and are laid out as capset(2) says.
    result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) })?;
    for capability in CAPABILITIES {
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, capability.into())?;
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
}
