//! Owns the bpf(2) calls that the eBPF library lacks, and the cookies of sockets and of the network namespace.
//! Called by `links` and `tables`, and by `dial/serve` for the cookie of a socket.
//! Must never know about policies: these are plain system calls.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

// Commands of `enum bpf_cmd` in the kernel's include/uapi/linux/bpf.h.
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

// Attach types of `enum bpf_attach_type`.
pub(crate) const BPF_XDP: u32 = 37;
pub(crate) const BPF_TCX_INGRESS: u32 = 46;

/// The attributes of `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[repr(C)]
#[derive(Default)]
struct ObjPath {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The attributes of `BPF_LINK_CREATE` for an interface. The rest of the union is zero.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    rest: [u64; 2],
}

/// The start of `struct bpf_link_info` for a cgroup link or one of an interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinkInfo {
    kind: u32,
    /// The link's id.
    pub(crate) id: u32,
    /// The attached program's id.
    pub(crate) program_id: u32,
    reserved: u32,
    /// Of a cgroup link: the cgroup's id, which is the inode number of its directory; 0 after the cgroup was removed. Of an interface's link,
    /// the first half is the index of the interface.
    pub(crate) cgroup_id: u64,
    attach_type: u32,
    padding: u32,
    /// Room for the fields of newer kernels.
    rest: [u64; 24],
}

impl LinkInfo {
    /// The index of the interface of an interface's link; 0 after the link was detached or the interface removed.
    pub(crate) fn interface(&self) -> u32 {
        let [a, b, c, d, ..] = self.cgroup_id.to_ne_bytes();
        u32::from_ne_bytes([a, b, c, d])
    }
}

/// Opens a pinned object.
pub(crate) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut attr = ObjPath { pathname: path.as_ptr() as u64, ..ObjPath::default() };
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins an object.
pub(crate) fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut attr = ObjPath { pathname: path.as_ptr() as u64, bpf_fd: object.as_raw_fd() as u32, file_flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Reads the kernel's information about a link.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attr = InfoByFd {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Attaches a program to an interface.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    interface: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let prog_fd = program.as_raw_fd() as u32;
    let mut attr = LinkCreate { prog_fd, target_ifindex: interface, attach_type, flags, ..LinkCreate::default() };
    let fd = bpf(BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the program in a link in one step: each packet meets the old program or the new one, and the link keeps its id.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: link.as_raw_fd() as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        ..LinkUpdate::default()
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Waits until every program run that began before this call has ended (`synchronize_rcu`, membarrier(2)).
pub(crate) fn grace_period() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: no pointers are passed.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of the caller's network namespace (`SO_NETNS_COOKIE`, since 5.14).
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    socket_u64(socket.as_fd(), 71)
}

/// The cookie of a socket (`SO_COOKIE`, Linux 4.12). The kernel never uses a cookie twice.
pub(crate) fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    socket_u64(socket, libc::SO_COOKIE)
}

/// Whether a directory is on a bpf file system (`BPF_FS_MAGIC`).
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    let stat = nix::sys::statfs::statfs(path)?;
    Ok(stat.filesystem_type().0 == 0xcafe_4a11)
}

fn socket_u64(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u64> {
    let mut value = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `value` and `len` are valid for writes, and `len` holds the size of `value`.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Calls bpf(2). The kernel may write into the attributes.
pub(crate) fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<i32> {
    // SAFETY: `attr` is a `repr(C)` prefix of `union bpf_attr` and lives through the call; the kernel takes a shorter one as zero-filled.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result >= 0 { Ok(result as i32) } else { Err(io::Error::last_os_error()) }
}
