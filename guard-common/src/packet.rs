//! Owns the step from the bytes of a packet to its addresses and ports: both IP families in one shape.
//! Called by every judgement about a packet.
//! Must never guess: what cannot be read is `None`, and `None` matches no pinhole and no peer.

use crate::abi::{Address, V4_PREFIX};

/// The IP protocol number of TCP.
pub const TCP: u8 = 6;
/// The IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Read access to a packet that starts at its IP header. The kernel implements it with direct access and a helper call as the fallback,
/// the host with a slice.
pub trait PacketBytes {
    /// The `N` bytes at `offset`, or `None` if the packet ends before them.
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

impl PacketBytes for [u8] {
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk::<N>().copied()
    }
}

/// What a judgement needs from a packet's headers. Aligned, so that addresses are copied by words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct Headers {
    /// The sender, IPv4 in mapped form.
    pub source: Address,
    /// The receiver, IPv4 in mapped form.
    pub destination: Address,
    /// Whether the packet is IPv4.
    pub is_v4: bool,
    /// `None` if the TCP or UDP header does not follow the IP header directly (IPv6 extension headers), is incomplete, or belongs to a
    /// fragment: such a packet is judged by its peer alone.
    pub ports: Option<Ports>,
}

/// The ports of a TCP or UDP header, network order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The sender's port.
    pub source: [u8; 2],
    /// The receiver's port, as the packet has it.
    pub destination: [u8; 2],
}

/// Reads a packet's headers; `None` if there is no complete, plausible IP header.
///
/// Ports are read only from a header of `protocol`. A decision takes the listener's port from the socket and not from here, so that no
/// unusual packet shape can hide it.
#[inline(always)]
pub fn parse<B: PacketBytes + ?Sized>(bytes: &B, protocol: u8) -> Option<Headers> {
    // Both headers have at least 20 bytes: one bounds check, wide enough that the verifier keeps the range.
    let head = bytes.at::<20>(0)?;
    match head[0] >> 4 {
        4 => parse_v4(bytes, &head, protocol),
        6 => parse_v6(bytes, head[6] == protocol),
        _ => None,
    }
}

#[inline(always)]
fn parse_v4<B: PacketBytes + ?Sized>(bytes: &B, header: &[u8; 20], protocol: u8) -> Option<Headers> {
    let header_len = usize::from(header[0] & 0x0f) << 2;
    if header_len < 20 {
        return None;
    }
    // More-fragments or a fragment offset: Linux reassembles before this hook, so a fragment here is not trusted.
    let is_fragment = cfg!(not(feature = "mutant")) && (header[6] & 0x3f | header[7]) != 0;
    let ports = if header[9] == protocol && !is_fragment { ports(bytes, header_len) } else { None };
    Some(Headers {
        source: mapped([header[12], header[13], header[14], header[15]]),
        destination: mapped([header[16], header[17], header[18], header[19]]),
        is_v4: true,
        ports,
    })
}

#[inline(always)]
fn parse_v6<B: PacketBytes + ?Sized>(bytes: &B, follows: bool) -> Option<Headers> {
    let source = bytes.at::<16>(8)?;
    let destination = bytes.at::<16>(24)?;
    // A mapped address on the wire would be taken for the IPv4 address; Linux drops such a source too (since 5.4).
    if is_mapped(&source) || is_mapped(&destination) {
        return None;
    }
    let ports = if follows { ports(bytes, 40) } else { None };
    Some(Headers { source, destination, is_v4: false, ports })
}

#[inline(always)]
fn ports<B: PacketBytes + ?Sized>(bytes: &B, offset: usize) -> Option<Ports> {
    let [a, b, c, d] = bytes.at::<4>(offset)?;
    Some(Ports { source: [a, b], destination: [c, d] })
}

/// The mapped form `::ffff:a.b.c.d` of an IPv4 address.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> Address {
    let p = V4_PREFIX;
    [p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], v4[0], v4[1], v4[2], v4[3]]
}

/// Whether an address is the mapped form of an IPv4 address.
#[inline(always)]
pub fn is_mapped(address: &Address) -> bool {
    address.first_chunk::<12>() == Some(&V4_PREFIX)
}

/// The last four bytes of a mapped address.
#[inline(always)]
pub const fn unmapped(address: &Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}
