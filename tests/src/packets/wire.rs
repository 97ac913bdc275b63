//! Owns packets as they are on the wire: sent and heard whole by an interface, past every check of the sender's own stack.
//! Called by tests that send what no socket would.
//! Must never be opened but on an interface of a namespace, or a machine, that the test made.

use std::{
    io::{Read, Write},
    mem::size_of_val,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::ethernet;
use crate::lab::client::timed_out;

/// An Ethernet header's length.
const ETHERNET: usize = 14;

/// An interface, heard and spoken to by whole frames.
pub struct Wire {
    socket: Socket,
    /// The interface's own hardware address.
    pub own: [u8; 6],
    /// Whom frames are sent to.
    pub next: [u8; 6],
}

impl Wire {
    /// Opens an interface of the namespace that this thread is in. What is sent goes to a neighbour by its hardware address.
    pub fn open(interface: &str, next: [u8; 6]) -> Result<Wire> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(all))))?;
        let (index, own) = hardware(interface)?;
        // SAFETY: the storage is larger than a `sockaddr_ll`, zeroed, and given the length of one.
        let ((), address) = unsafe {
            SockAddr::try_init(|storage, length| {
                let address = &mut *storage.cast::<libc::sockaddr_ll>();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = all;
                address.sll_ifindex = index;
                *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                Ok(())
            })?
        };
        socket.bind(&address).with_context(|| format!("cannot bind to {interface}"))?;
        let wire = Wire { socket, own, next };
        // Linux 4.20: what this machine sent itself is not heard.
        wire.set(libc::PACKET_IGNORE_OUTGOING)?;
        Ok(wire)
    }

    /// Switches on an option of a packet socket.
    fn set(&self, option: libc::c_int) -> Result<()> {
        let (fd, on): (_, libc::c_int) = (self.socket.as_raw_fd(), 1);
        // SAFETY: the value lives through the call and is as long as we say.
        let set = unsafe {
            libc::setsockopt(fd, libc::SOL_PACKET, option, (&raw const on).cast(), size_of_val(&on) as libc::socklen_t)
        };
        ensure!(set == 0, "option {option} of a packet socket: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Sends a packet from its IP header on.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        (&self.socket).write(&ethernet(self.next, self.own, packet)).context("cannot send a frame").map(drop)
    }

    /// Sends a packet of more than a page so that only its Ethernet header is in the buffer's linear part. What is received afterwards has a
    /// header more: this is for a wire that only sends.
    pub fn send_paged(&self, packet: &[u8]) -> Result<()> {
        const PACKET_VNET_HDR: libc::c_int = 15;
        self.set(PACKET_VNET_HDR)?;
        // `struct virtio_net_hdr`: no flags, no segmentation, so long a linear part.
        let mut frame = vec![0u8; 10];
        frame[2..4].copy_from_slice(&(ETHERNET as u16).to_ne_bytes());
        frame.extend(ethernet(self.next, self.own, packet));
        (&self.socket).write(&frame).context("cannot send a frame").map(drop)
    }

    /// The next packet that came in, from its IP header on; `None` where none came within so long.
    pub fn receive(&self, patience: Duration) -> Result<Option<Vec<u8>>> {
        let (until, mut buffer) = (Instant::now() + patience, vec![0u8; 10_000]);
        loop {
            // A time-out of zero would be none.
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
            self.socket.set_read_timeout(Some(left))?;
            match (&self.socket).read(&mut buffer) {
                Ok(count) if count >= ETHERNET => return Ok(buffer.get(ETHERNET..count).map(<[u8]>::to_vec)),
                Ok(_) => {}
                Err(error) if timed_out(&error) => return Ok(None),
                Err(error) => return Err(error).context("cannot receive a frame"),
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
