//! Owns why the kernel half could not be opened.
//! Called by everything in `kernel` that opens, loads, attaches or pins.
//! Must never lose the cause that the kernel gave.

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::{EbpfError, maps::MapError, pin::PinError};

/// Why the kernel half could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The pin directory is not on bpffs.
    #[error(
        "{0} is not on a bpf file system: pins there would not outlive the daemon. Mount one first: mount -t bpf bpf /sys/fs/bpf"
    )]
    NotBpffs(PathBuf),
    /// A system call on a path failed.
    #[error("{0}: {1}")]
    Path(PathBuf, #[source] io::Error),
    /// A pinned map is not what this binary expects.
    #[error(
        "the pinned map {path} has another shape ({found}; this binary expects {expected}): it was made by another build. Run `nodeguard unpin` to remove what is pinned, then start again"
    )]
    MapMismatch {
        /// Its pin.
        path: PathBuf,
        /// Its definition.
        found: String,
        /// The definition in this binary's object.
        expected: String,
    },
    /// The object lacks a map or program that this binary names.
    #[error("the kernel object has no {0}: it does not belong to this binary")]
    Missing(&'static str),
    /// The object could not be parsed.
    #[error("the built-in kernel object does not parse")]
    Object(#[source] aya_obj::ParseError),
    /// The kernel refused maps or globals.
    #[error("the kernel refused the maps (are CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON there?)")]
    Ebpf(#[from] EbpfError),
    /// A map could not be opened.
    #[error("a map could not be opened")]
    Map(#[from] MapError),
    /// The kernel refused a program.
    #[error("the kernel refused the program {0}: {1}")]
    Program(&'static str, String),
    /// A program or link could not be pinned.
    #[error("cannot pin {0}")]
    Pin(PathBuf, #[source] PinError),
    /// A pinned link is attached elsewhere.
    #[error(
        "the pinned link {path} is attached to another cgroup than {cgroup}. Run `nodeguard unpin` with the --bpffs of that guard, or choose another --bpffs"
    )]
    OtherCgroup {
        /// The link's pin.
        path: PathBuf,
        /// The cgroup that was asked for.
        cgroup: PathBuf,
    },
}

pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> LoadError + use<> {
    let path = path.to_path_buf();
    move |error| LoadError::Path(path, error)
}
