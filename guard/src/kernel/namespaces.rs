//! Owns the network namespaces of this node: finding them, entering them, their cookies and addresses.
//! Called by `cut/established`, `links/earlier_sockets`, and by `daemon` to keep the kernel's table of namespaces true.
//! Must never hold a namespace open: a pod's namespace ends with the pod.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use guard_policy::tables::pod_scopes::Namespaces;
use nix::sched::{CloneFlags, setns};

use crate::{kernel::syscalls, net::pods};

/// The network namespaces that have a process, one descriptor for each.
pub(crate) struct Found {
    /// Each namespace with its inode, the calling process's own first.
    pub(crate) namespaces: Vec<(u64, File)>,
    /// Whether there may be more: a process is hidden, or its namespace cannot be opened.
    pub(crate) incomplete: bool,
}

/// Finds the network namespace of every process that this process sees.
pub(crate) fn find() -> io::Result<Found> {
    let own = File::open("/proc/self/ns/net")?;
    let mut incomplete = !sees_all_processes();
    let mut known = HashSet::from([own.metadata()?.ino()]);
    let mut namespaces = vec![(own.metadata()?.ino(), own)];
    for process in processes(Path::new("/proc"))? {
        let opened =
            File::open(process.join("ns/net")).and_then(|namespace| Ok((namespace.metadata()?.ino(), namespace)));
        match opened {
            Ok((id, namespace)) if known.insert(id) => namespaces.push((id, namespace)),
            Ok(_) => {}
            Err(error) => incomplete |= !has_ended(&error),
        }
    }
    Ok(Found { namespaces, incomplete })
}

/// Whether an error says that the process has ended meanwhile. Anything else, also a lack of descriptors or memory, hides a namespace.
fn has_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Whether this process sees every process of the machine: the initial pid namespace has a fixed inode (Linux, PROC_PID_INIT_INO).
fn sees_all_processes() -> bool {
    fs::metadata("/proc/self/ns/pid").is_ok_and(|about| about.ino() == 0xEFFF_FFFC)
}

/// The directories of all processes in a proc file system.
fn processes(proc: &Path) -> io::Result<impl Iterator<Item = PathBuf> + use<>> {
    let is_process = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
    Ok(fs::read_dir(proc)?.flatten().filter(is_process).map(|entry| entry.path()))
}

/// Runs code in a network namespace: on this thread if it is the current one, which needs no CAP_SYS_ADMIN, otherwise on a new thread.
pub(crate) fn in_namespace<T: Send>(namespace: &File, code: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    if namespace.metadata()?.ino() == fs::metadata("/proc/thread-self/ns/net")?.ino() {
        return code();
    }
    let enter = || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        code()
    };
    std::thread::scope(|scope| match std::thread::Builder::new().spawn_scoped(scope, enter) {
        Ok(thread) => {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the network namespace panicked")))
        }
        Err(error) => Err(error),
    })
}

/// Keeps track of the network namespaces and their addresses.
#[derive(Debug, Default)]
pub struct NamespaceView {
    /// The cookie of each namespace, by its inode and a process in it with the time of its start: both can be used again, but not together.
    cookies: HashMap<(u64, PathBuf, u64), u64>,
}

impl NamespaceView {
    /// The addresses of each network namespace that can be entered, without the calling process's own.
    ///
    /// # Errors
    ///
    /// The list of processes cannot be read.
    pub fn look(&mut self) -> io::Result<Namespaces> {
        let mut seen: HashSet<u64> = pods::inode(Path::new("/proc/self/net")).into_iter().collect();
        let mut before = std::mem::take(&mut self.cookies);
        let mut found: Vec<(u64, BTreeSet<IpAddr>)> = Vec::new();
        for process in processes(Path::new("/proc"))? {
            let net = process.join("net");
            let Some(inode) = pods::inode(&net).filter(|inode| !seen.contains(inode)) else { continue };
            let Some(started) = start_time(&process) else { continue };
            let key = (inode, process.clone(), started);
            let cookie = match before.remove(&key) {
                Some(cookie) => Ok(cookie),
                None => File::open(process.join("ns/net"))
                    .and_then(|namespace| in_namespace(&namespace, syscalls::netns_cookie)),
            };
            // One that cannot be entered stays unknown; another process of it may be visible.
            if let Ok(cookie) = cookie {
                seen.insert(inode);
                found.push((cookie, pods::local_addresses(&net)));
                self.cookies.insert(key, cookie);
            }
        }
        Ok(found.into_iter().collect())
    }
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/PID/stat`.
fn start_time(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The name, in parentheses, may itself contain spaces and parentheses.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
