//! Owns the flood: SYNs of strangers, as many as one processor can send through a packet socket.
//! Called by `flood`, in the stranger's namespace.
//! Must never send anywhere but to the node of its lab, and never longer than it is told.

use std::{
    io,
    mem::zeroed,
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lab::net::Who;
use nix::net::if_::if_nametoindex;

use crate::traffic::{OTHER_CPU, pin};

/// The sources are strangers of 10.0.16.0/20: nobody answers there, and no rule admits them.
const SOURCES: u32 = 8192;
/// Frames of one system call.
const BURST: usize = 64;
const FRAME: usize = 54;

/// The hardware address of an interface of the calling thread's network namespace.
pub(crate) fn hardware_address(interface: &str) -> Result<[u8; 6]> {
    let mut all = nix::ifaddrs::getifaddrs()?.filter(|address| address.interface_name == interface);
    all.find_map(|address| address.address?.as_link_addr()?.addr()).context("no hardware address")
}

/// Floods a port of the node from the calling thread's network namespace for so long.
pub(crate) fn flood(to: [u8; 6], port: u16, time: Duration) -> Result<()> {
    pin(OTHER_CPU)?;
    let socket = packet_socket("eth0")?;
    let from = hardware_address("eth0")?;
    let mut frames: Vec<[u8; FRAME]> = (0..SOURCES).map(|number| frame(from, to, port, number)).collect();
    // SAFETY: all-zero is a value of these C structs.
    let empty: (libc::iovec, libc::mmsghdr) = unsafe { (zeroed(), zeroed()) };
    let mut vectors = vec![empty.0; frames.len()];
    for (vector, frame) in vectors.iter_mut().zip(&mut frames) {
        *vector = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: FRAME };
    }
    let mut messages = vec![empty.1; vectors.len()];
    for (message, vector) in messages.iter_mut().zip(&mut vectors) {
        message.msg_hdr.msg_iov = vector;
        message.msg_hdr.msg_iovlen = 1;
    }
    let started = Instant::now();
    while started.elapsed() < time {
        for burst in messages.chunks_mut(BURST) {
            // SAFETY: the messages, their vectors and their frames live through the call, and are as long as they say.
            let count = unsafe { libc::sendmmsg(socket.as_raw_fd(), burst.as_mut_ptr(), burst.len() as u32, 0) };
            // ENOBUFS and EAGAIN: the queue behind the interface is full.
            if count < 0 && !matches!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) {
                return Err(io::Error::last_os_error().into());
            }
        }
    }
    Ok(())
}

/// A packet socket that sends out of an interface, past its queue.
fn packet_socket(interface: &str) -> Result<OwnedFd> {
    // SAFETY: no pointers are passed; the descriptor, where there is one, is ours.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("a packet socket");
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: all-zero is a value of this C struct.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = if_nametoindex(interface)? as i32;
    let bypass: libc::c_int = 1;
    // SAFETY: address and option are ours and as long as we say.
    let results = unsafe {
        [
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32),
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const bypass).cast(),
                size_of_val(&bypass) as u32,
            ),
        ]
    };
    if results.contains(&-1) { Err(io::Error::last_os_error()).context("a packet socket") } else { Ok(socket) }
}

/// A SYN with right checksums: one with wrong ones would be dropped before anybody judges it.
fn frame(from: [u8; 6], to: [u8; 6], port: u16, number: u32) -> [u8; FRAME] {
    let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 16, 0)) | (number & 0xfff));
    let mut frame = [0u8; FRAME];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip = &mut frame[14..34];
    ip.copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    ip[12..16].copy_from_slice(&source.octets());
    ip[16..20].copy_from_slice(&Who::Node.v4().octets());
    let sum = checksum(ip, 0);
    ip[10..12].copy_from_slice(&sum);
    let addresses: Vec<u8> = ip[12..20].to_vec();
    let tcp = &mut frame[34..];
    tcp[..2].copy_from_slice(&(1024 + (number >> 12) as u16 * 7 + number as u16 % 30_000).to_be_bytes());
    tcp[2..4].copy_from_slice(&port.to_be_bytes());
    tcp[4..8].copy_from_slice(&number.to_be_bytes());
    tcp[12..16].copy_from_slice(&[0x50, 0x02, 0xff, 0xff]);
    // The pseudo header: addresses, protocol, length.
    let sum = checksum(&[&addresses[..], &tcp[..]].concat(), 6 + 20);
    tcp[16..18].copy_from_slice(&sum);
    frame
}

fn checksum(bytes: &[u8], more: u32) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum = words.sum::<u32>() + more;
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
