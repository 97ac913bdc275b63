//! Owns packets as they are on the wire: sent and heard whole by an interface, past every check of the sender's own stack.
//! Called by tests that send what no socket would.
//! Must never be opened but on an interface of a namespace, or a machine, that the test made.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// An Ethernet header's length.
const ETHERNET: usize = 14;
/// One of the kernel's `sockaddr_ll.sll_pkttype`s: what this machine sent itself.
const OUTGOING: u8 = 4;

/// An interface, heard and spoken to by whole frames.
pub struct Wire {
    socket: OwnedFd,
    /// The interface's own hardware address.
    pub own: [u8; 6],
    /// Whom frames are sent to.
    pub next: [u8; 6],
}

impl Wire {
    /// Opens an interface of the namespace that this thread is in. What is sent goes to a neighbour by its hardware address.
    pub fn open(interface: &str, next: [u8; 6]) -> Result<Wire> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all)) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("a packet socket");
        }
        // SAFETY: the kernel has just given this descriptor to us.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let (index, own) = hardware(interface)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: all,
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address lives through the call and is as long as we say.
        let bound =
            unsafe { libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
        if bound != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("cannot bind to {interface}"));
        }
        Ok(Wire { socket, own, next })
    }

    /// Sends a packet from its IP header on.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        let frame = self.frame(packet);
        self.write(&frame)
    }

    /// Sends a packet of more than a page so that only its Ethernet header is in the buffer's linear part. What is received afterwards has a
    /// header more: this is for a wire that only sends.
    pub fn send_paged(&self, packet: &[u8]) -> Result<()> {
        const PACKET_VNET_HDR: libc::c_int = 15;
        let on: libc::c_int = 1;
        // SAFETY: the value lives through the call and is as long as we say.
        let set = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_VNET_HDR,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error()).context("PACKET_VNET_HDR");
        }
        // `struct virtio_net_hdr`: no flags, no segmentation, so long a linear part.
        let mut frame = vec![0u8; 10];
        frame[2..4].copy_from_slice(&(ETHERNET as u16).to_ne_bytes());
        frame.extend(self.frame(packet));
        self.write(&frame)
    }

    fn frame(&self, packet: &[u8]) -> Vec<u8> {
        let kind: [u8; 2] = if packet.first().is_some_and(|byte| byte >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] };
        [&self.next[..], &self.own, &kind, packet].concat()
    }

    fn write(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the bytes live through the call.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error()).context("cannot send a frame");
        }
        Ok(())
    }

    /// The next packet that came in, from its IP header on; `None` where none came within so long.
    pub fn receive(&self, patience: Duration) -> Result<Option<Vec<u8>>> {
        let until = Instant::now() + patience;
        let mut buffer = vec![0u8; 10_000];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut ready = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor of ours.
            let found = unsafe { libc::poll(&raw mut ready, 1, left.as_millis().min(10_000) as libc::c_int) };
            if found == 0 {
                return Ok(None);
            }
            // SAFETY: all zero is a valid `sockaddr_ll`.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: buffer and address are ours and as long as we say.
            let count = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut length,
                )
            };
            if count < 0 {
                return Err(io::Error::last_os_error()).context("cannot receive a frame");
            }
            if from.sll_pkttype != OUTGOING
                && let Some(packet) = buffer.get(ETHERNET..count as usize)
            {
                return Ok(Some(packet.to_vec()));
            }
        }
    }
}

/// The index and hardware address of an interface of the namespace that this thread is in.
pub fn hardware(interface: &str) -> Result<(i32, [u8; 6])> {
    for found in nix::ifaddrs::getifaddrs()?.filter(|found| found.interface_name == interface) {
        if let Some(link) = found.address.as_ref().and_then(|address| address.as_link_addr()) {
            return Ok((i32::try_from(link.ifindex())?, link.addr().unwrap_or_default()));
        }
    }
    bail!("there is no interface {interface}")
}
