//! Owns the errors of opening the kernel half.
//! Called by everything in `kernel` that opens, loads, attaches or pins.
//! Must never lose the cause that the kernel reported.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use aya::{EbpfError, maps::MapError, pin::PinError, programs::ProgramError};

use crate::kernel::links::map_definition::MapDefinition;

/// Why the kernel half could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The pin directory is not on bpffs.
    #[error(
        "{0} is not on a bpf file system, so pins there would not outlive the daemon; mount one first: mount -t bpf bpf /sys/fs/bpf"
    )]
    NotBpffs(PathBuf),
    /// A system call on a path failed.
    #[error("cannot use {0}")]
    Path(PathBuf, #[source] io::Error),
    /// A pinned map has another definition than this build's map.
    #[error(
        "the pinned map {path} was created by another build: it has {found}, and this build expects {expected}; remove the pins with `nodeguard unpin`, then start again"
    )]
    MapMismatch {
        /// The pin of the map.
        path: PathBuf,
        /// The definition of the pinned map.
        found: MapDefinition,
        /// The definition in this build's object.
        expected: MapDefinition,
    },
    /// The object lacks a map or a program that this build needs.
    #[error("the built-in kernel object has no {0}")]
    Missing(&'static str),
    /// The object could not be parsed.
    #[error("cannot parse the built-in kernel object")]
    Object(#[source] aya_obj::ParseError),
    /// The kernel refused the maps or the global variables.
    #[error("the kernel refused the maps; check that the process has CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    Ebpf(#[from] EbpfError),
    /// A map could not be opened.
    #[error("cannot open a map")]
    Map(#[from] MapError),
    /// The verifier or the kernel refused a program.
    #[error("the kernel refused the program {0}")]
    Load(&'static str, #[source] LoadRefusal),
    /// A program could not be attached to the cgroup.
    #[error("cannot attach the program {0}")]
    Attach(&'static str, #[source] ProgramError),
    /// The kernel gave no information about a loaded program.
    #[error("cannot read the program {0}")]
    Program(&'static str, #[source] ProgramError),
    /// A program or link could not be pinned.
    #[error("cannot pin {0}")]
    Pin(PathBuf, #[source] PinError),
    /// A pinned link is attached elsewhere.
    #[error(
        "the pinned link {path} is attached to another cgroup than {cgroup}; run `nodeguard unpin` with the --bpffs of that guard, or choose another --bpffs"
    )]
    OtherCgroup {
        /// The pin of the link.
        path: PathBuf,
        /// The cgroup to attach to.
        cgroup: PathBuf,
    },
}

/// The end of a verifier's log says why a program was refused. The thousands of lines before it only show the way there.
const VERIFIER_LINES: usize = 12;

/// Why the kernel refused a program: the error with the end of the verifier's log.
#[derive(Debug)]
pub struct LoadRefusal(pub(crate) ProgramError);

impl fmt::Display for LoadRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let lines: Vec<&str> = text.lines().collect();
        f.write_str(&lines[lines.len().saturating_sub(VERIFIER_LINES)..].join("\n"))
    }
}

impl std::error::Error for LoadRefusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The text of a load error contains its cause.
        if matches!(self.0, ProgramError::LoadError { .. }) { None } else { self.0.source() }
    }
}

/// Adds the path to the error of a system call.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> LoadError + use<> {
    let path = path.to_path_buf();
    move |error| LoadError::Path(path, error)
}
