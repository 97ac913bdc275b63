//! Owns building packets, and reading what comes back: headers, options, extension headers, fragments, checksums.
//! Called by the parts of this room, by the benches, and by tests that speak TCP themselves.
//! Must never build what a header says otherwise, unless a caller changes it afterwards.
#![expect(clippy::unwrap_used, reason = "headers that are too long are a mistake of the test that builds them")]

pub mod judged;
mod samples;
pub mod shapes;
pub mod wire;

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, IpSlice, Ipv4Header, Ipv6Header,
    TcpHeader, UdpHeader, checksum::Sum16BitWords, ip_number,
};
use guard_common::{
    abi::FlowKey,
    packet::{TCP, UDP, mapped},
};
pub use samples::{Sample, named, pick, random};

const FIN: u8 = 1;
/// TCP flags.
pub const SYN: u8 = 2;
const RST: u8 = 4;
/// TCP flags.
pub const PSH: u8 = 8;
/// TCP flags.
pub const ACK: u8 = 16;
const URG: u8 = 32;

/// IPv6 extension headers.
pub const HOP_BY_HOP: u8 = ip_number::IPV6_HEADER_HOP_BY_HOP.0;
const ROUTING: u8 = ip_number::IPV6_ROUTE_HEADER.0;
const FRAGMENT: u8 = ip_number::IPV6_FRAGMENTATION_HEADER.0;
/// IPv6 extension headers.
pub const DESTINATION_OPTIONS: u8 = ip_number::IPV6_DESTINATION_OPTIONS.0;

/// Who sends to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The sender.
    pub from: SocketAddr,
    /// The receiver.
    pub to: SocketAddr,
}

impl Flow {
    /// The same from another port.
    pub fn from_port(self, port: u16) -> Flow {
        Flow { from: SocketAddr::new(self.from.ip(), port), ..self }
    }

    /// The same as the guard knows it.
    pub fn key(self) -> FlowKey {
        FlowKey {
            source: octets(self.from.ip()),
            destination: octets(self.to.ip()),
            source_port: self.from.port().to_be_bytes(),
            destination_port: self.to.port().to_be_bytes(),
        }
    }
}

/// An address as the guard knows it: IPv4 is mapped into IPv6.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

fn v4_octets(address: SocketAddr) -> [u8; 4] {
    let [.., a, b, c, d] = octets(address.ip());
    [a, b, c, d]
}

/// A TCP segment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment<'a> {
    /// A set of flags.
    pub flags: u8,
    /// The sequence number.
    pub seq: u32,
    /// The acknowledged one.
    pub ack: u32,
    /// Padded to words.
    pub options: &'a [u8],
    /// What it carries.
    pub data: &'a [u8],
}

/// A TCP segment's bytes, with their checksum.
pub fn tcp(flow: Flow, segment: Segment<'_>) -> Vec<u8> {
    let has = |flag: u8| segment.flags & flag != 0;
    let mut header = TcpHeader {
        fin: has(FIN),
        syn: has(SYN),
        rst: has(RST),
        psh: has(PSH),
        ack: has(ACK),
        urg: has(URG),
        acknowledgment_number: segment.ack,
        ..TcpHeader::new(flow.from.port(), flow.to.port(), segment.seq, u16::MAX)
    };
    header.set_options_raw(segment.options).unwrap();
    with_checksum(flow, TCP, 16, [&header.to_bytes()[..], segment.data].concat())
}

/// A UDP datagram's bytes, with their checksum.
pub fn udp(flow: Flow, data: &[u8]) -> Vec<u8> {
    let header = UdpHeader {
        source_port: flow.from.port(),
        destination_port: flow.to.port(),
        length: (UdpHeader::LEN + data.len()) as u16,
        checksum: 0,
    };
    with_checksum(flow, UDP, 6, [&header.to_bytes()[..], data].concat())
}

/// A SYN that carries nothing.
pub fn syn(flow: Flow, seq: u32) -> Vec<u8> {
    tcp(flow, Segment { flags: SYN, seq, ..Segment::default() })
}

/// An echo request of the family's ICMP.
pub fn ping(flow: Flow) -> Vec<u8> {
    let echo = IcmpEchoHeader { id: 0x1234, seq: 1 };
    if flow.to.is_ipv4() {
        return Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &[]).to_bytes().to_vec();
    }
    let (from, to) = (octets(flow.from.ip()), octets(flow.to.ip()));
    Icmpv6Header::with_checksum(Icmpv6Type::EchoRequest(echo), from, to, &[]).unwrap().to_bytes().to_vec()
}

/// Writes the checksum over the pseudo header and these bytes, in which its own place is zero.
fn with_checksum(flow: Flow, protocol: u8, at: usize, mut bytes: Vec<u8>) -> Vec<u8> {
    // The 0xffff of a mapped IPv4 address adds nothing to a sum in ones' complement.
    let addresses = [octets(flow.from.ip()), octets(flow.to.ip())].concat();
    let sum = Sum16BitWords::new().add_slice(&addresses).add_2bytes([0, protocol]);
    let sum = sum.add_2bytes((bytes.len() as u16).to_be_bytes()).add_slice(&bytes);
    bytes[at..at + 2].copy_from_slice(&sum.ones_complement().to_ne_bytes());
    bytes
}

/// A packet of the flow's family without options or extension headers.
pub fn ip(flow: Flow, protocol: u8, payload: &[u8]) -> Vec<u8> {
    if flow.to.is_ipv4() { v4(flow, protocol, &[], payload) } else { v6(flow, &[], protocol, payload) }
}

/// An IPv4 packet; options are padded to words with end-of-list.
pub fn v4(flow: Flow, protocol: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut options = options.to_vec();
    options.resize(options.len().next_multiple_of(4), 0);
    let mut header = Ipv4Header {
        // The identification of fragments: one of a flow is enough, flows differ in their ports.
        identification: flow.from.port(),
        dont_fragment: false,
        options: options[..].try_into().unwrap(),
        ..Ipv4Header::new(0, 64, IpNumber(protocol), v4_octets(flow.from), v4_octets(flow.to)).unwrap()
    };
    header.set_payload_len(payload.len()).unwrap();
    header.header_checksum = header.calc_header_checksum();
    [&header.to_bytes()[..], payload].concat()
}

/// Writes an IPv4 header's checksum anew, whatever the header says.
pub fn seal(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let header = usize::from(packet[0] & 15) * 4;
    let sum = Sum16BitWords::new().add_slice(&packet[..header.min(packet.len())]).ones_complement();
    packet[10..12].copy_from_slice(&sum.to_ne_bytes());
}

/// An IPv4 packet in fragments that begin at these offsets (multiples of eight); the first is 0.
pub fn v4_fragments(packet: &[u8], starts: &[usize]) -> Vec<Vec<u8>> {
    let payload = Ipv4Header::from_slice(packet).unwrap().1;
    pieces(payload.len(), starts).map(|(start, end)| v4_fragment(packet, start, end)).collect()
}

/// One fragment of an IPv4 packet, with a part of its payload.
pub fn v4_fragment(packet: &[u8], start: usize, end: usize) -> Vec<u8> {
    let (mut header, payload) = Ipv4Header::from_slice(packet).unwrap();
    header.fragment_offset = (start as u16 / 8).try_into().unwrap();
    header.more_fragments = end < payload.len();
    header.set_payload_len(end - start).unwrap();
    header.header_checksum = header.calc_header_checksum();
    [&header.to_bytes()[..], &payload[start..end]].concat()
}

/// Where each piece begins and ends.
fn pieces(length: usize, starts: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    starts.iter().copied().zip(starts.iter().skip(1).copied().chain([length]))
}

/// An IPv6 packet with extension headers, in this order.
pub fn v6(flow: Flow, headers: &[(u8, Vec<u8>)], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let kinds: Vec<u8> = headers.iter().map(|(kind, _)| *kind).chain([protocol]).collect();
    let mut body = Vec::new();
    for ((_, header), next) in headers.iter().zip(&kinds[1..]) {
        body.push(*next);
        body.extend(&header[1..]);
    }
    body.extend(payload);
    let header = Ipv6Header {
        payload_length: body.len() as u16,
        next_header: IpNumber(kinds[0]),
        hop_limit: 64,
        source: octets(flow.from.ip()),
        destination: octets(flow.to.ip()),
        ..Ipv6Header::default()
    };
    [&header.to_bytes()[..], &body].concat()
}

/// An options header (hop-by-hop or destination) that says nothing, of eight bytes.
pub fn padding(kind: u8) -> (u8, Vec<u8>) {
    (kind, vec![0, 0, 1, 4, 0, 0, 0, 0])
}

/// A fragment header; of a whole packet where it starts at 0 and nothing follows.
pub fn fragment(id: u32, start: usize, more: bool) -> (u8, Vec<u8>) {
    let offset = (start as u16 & 0xfff8) | u16::from(more);
    (FRAGMENT, [&[0, 0][..], &offset.to_be_bytes(), &id.to_be_bytes()].concat())
}

/// A payload in IPv6 fragments that begin at these offsets (multiples of eight); the first is 0.
pub fn v6_fragments(flow: Flow, protocol: u8, payload: &[u8], starts: &[usize]) -> Vec<Vec<u8>> {
    let piece = |(start, end)| {
        let header = fragment(flow.from.port().into(), start, end < payload.len());
        v6(flow, &[header], protocol, &payload[start..end])
    };
    pieces(payload.len(), starts).map(piece).collect()
}

/// A packet behind an Ethernet header.
pub fn ethernet(to: [u8; 6], from: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if packet.first().is_some_and(|byte| byte >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] };
    [&to[..], &from, &kind, packet].concat()
}

/// What came back on a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A TCP segment's header and data.
    Tcp(Box<TcpHeader>, Vec<u8>),
    /// A UDP datagram's data.
    Udp(Vec<u8>),
    /// An answer to a ping.
    Pong,
}

/// Reads a packet as an answer on a flow; `None` where it is none. Answers have no extension headers.
pub fn heard(flow: Flow, packet: &[u8]) -> Option<Heard> {
    // The frame may be padded behind the packet; this ends where the header says.
    let packet = IpSlice::from_slice(packet).ok()?;
    if packet.source_addr() != flow.to.ip() || packet.destination_addr() != flow.from.ip() {
        return None;
    }
    let payload = packet.payload().payload;
    let is_on_flow = payload.starts_with(&[flow.to.port().to_be_bytes(), flow.from.port().to_be_bytes()].concat());
    match packet.payload_ip_number().0 {
        TCP if is_on_flow => {
            let (header, data) = TcpHeader::from_slice(payload).ok()?;
            Some(Heard::Tcp(Box::new(header), data.to_vec()))
        }
        UDP if is_on_flow => Some(Heard::Udp(payload.get(8..)?.to_vec())),
        1 if *payload.first()? == 0 => Some(Heard::Pong),
        58 if *payload.first()? == 129 => Some(Heard::Pong),
        _ => None,
    }
}
