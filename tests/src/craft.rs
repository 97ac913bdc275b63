//! Owns building packets byte by byte: headers, options, extension headers, fragments, checksums.
//! Called by `shapes`, and by tests that speak TCP themselves.
//! Must never build what a header says otherwise, unless a caller changes it afterwards.

use std::net::{IpAddr, SocketAddr};

use guard_common::{abi::FlowKey, packet::mapped};

/// TCP flags.
pub const FIN: u8 = 1;
/// TCP flags.
pub const SYN: u8 = 2;
/// TCP flags.
pub const RST: u8 = 4;
/// TCP flags.
pub const PSH: u8 = 8;
/// TCP flags.
pub const ACK: u8 = 16;

/// IPv6 extension headers.
pub const HOP_BY_HOP: u8 = 0;
/// IPv6 extension headers.
pub const ROUTING: u8 = 43;
/// IPv6 extension headers.
pub const FRAGMENT: u8 = 44;
/// IPv6 extension headers.
pub const DESTINATION_OPTIONS: u8 = 60;

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
}

impl Flow {
    /// The same as the guard knows it.
    pub fn key(self) -> FlowKey {
        let address = |address: SocketAddr| match address.ip() {
            IpAddr::V4(address) => mapped(address.octets()),
            IpAddr::V6(address) => address.octets(),
        };
        FlowKey {
            source: address(self.from),
            destination: address(self.to),
            source_port: self.from.port().to_be_bytes(),
            destination_port: self.to.port().to_be_bytes(),
        }
    }
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
    let Segment { flags, seq, ack, options, data } = segment;
    let header = (20 + options.len()).next_multiple_of(4);
    let mut bytes = [&flow.from.port().to_be_bytes()[..], &flow.to.port().to_be_bytes()].concat();
    bytes.extend(seq.to_be_bytes());
    bytes.extend(ack.to_be_bytes());
    bytes.extend([(header as u8 / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(options);
    bytes.resize(header, 0);
    bytes.extend(data);
    let sum = checksum(flow, 6, &bytes);
    bytes[16..18].copy_from_slice(&sum);
    bytes
}

/// A UDP datagram's bytes, with their checksum.
pub fn udp(flow: Flow, data: &[u8]) -> Vec<u8> {
    let mut bytes = [&flow.from.port().to_be_bytes()[..], &flow.to.port().to_be_bytes()].concat();
    bytes.extend((8 + data.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(data);
    let sum = checksum(flow, 17, &bytes);
    bytes[6..8].copy_from_slice(&sum);
    bytes
}

/// An echo request of the family's ICMP.
pub fn ping(flow: Flow) -> Vec<u8> {
    let (kind, protocol) = if flow.to.is_ipv4() { (8, 1) } else { (128, 58) };
    let mut bytes = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1];
    let sum = if flow.to.is_ipv4() { fold(sum_of(&bytes)) } else { checksum(flow, protocol, &bytes) };
    bytes[2..4].copy_from_slice(&sum);
    bytes
}

/// A packet of the flow's family without options or extension headers.
pub fn ip(flow: Flow, protocol: u8, payload: &[u8]) -> Vec<u8> {
    if flow.to.is_ipv4() { v4(flow, protocol, &[], payload) } else { v6(flow, &[], protocol, payload) }
}

/// An IPv4 packet; options are padded to words with end-of-list.
pub fn v4(flow: Flow, protocol: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = (20 + options.len()).next_multiple_of(4);
    let mut bytes = vec![0x40 | (header / 4) as u8, 0];
    bytes.extend(((header + payload.len()) as u16).to_be_bytes());
    // The identification of fragments: one of a flow is enough, flows differ in their ports.
    bytes.extend(flow.from.port().to_be_bytes());
    bytes.extend([0, 0, 64, protocol, 0, 0]);
    bytes.extend(octets(flow.from.ip()));
    bytes.extend(octets(flow.to.ip()));
    bytes.extend(options);
    bytes.resize(header, 0);
    seal(&mut bytes);
    bytes.extend(payload);
    bytes
}

/// Writes an IPv4 header's checksum anew.
pub fn seal(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let header = usize::from(packet[0] & 15) * 4;
    let sum = fold(sum_of(&packet[..header.min(packet.len())]));
    packet[10..12].copy_from_slice(&sum);
}

/// An IPv4 packet in fragments that begin at these offsets (multiples of eight); the first is 0.
pub fn v4_fragments(packet: &[u8], starts: &[usize]) -> Vec<Vec<u8>> {
    let header = usize::from(packet[0] & 15) * 4;
    let payload = &packet[header..];
    let piece = |index: usize| {
        let (start, end) = (starts[index], starts.get(index + 1).copied().unwrap_or(payload.len()));
        v4_fragment(packet, start, &payload[start..end], end < payload.len())
    };
    (0..starts.len()).map(piece).collect()
}

/// One fragment of an IPv4 packet.
pub fn v4_fragment(packet: &[u8], start: usize, piece: &[u8], more: bool) -> Vec<u8> {
    let header = usize::from(packet[0] & 15) * 4;
    let mut bytes = packet[..header].to_vec();
    bytes[2..4].copy_from_slice(&((header + piece.len()) as u16).to_be_bytes());
    bytes[6..8].copy_from_slice(&((start / 8) as u16 | if more { 0x2000 } else { 0 }).to_be_bytes());
    seal(&mut bytes);
    bytes.extend(piece);
    bytes
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
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend((body.len() as u16).to_be_bytes());
    bytes.extend([kinds[0], 64]);
    bytes.extend(octets(flow.from.ip()));
    bytes.extend(octets(flow.to.ip()));
    bytes.extend(body);
    bytes
}

/// An options header (hop-by-hop or destination) that says nothing, of eight bytes.
pub fn padding(kind: u8) -> (u8, Vec<u8>) {
    (kind, vec![0, 0, 1, 4, 0, 0, 0, 0])
}

/// A hop-by-hop header with the router-alert option (RFC 2711).
pub fn router_alert() -> (u8, Vec<u8>) {
    (HOP_BY_HOP, vec![0, 0, 5, 2, 0, 0, 1, 0])
}

/// A routing header of type 0 with no segments left.
pub fn routing() -> (u8, Vec<u8>) {
    (ROUTING, vec![0; 8])
}

/// A fragment header; of a whole packet where it starts at 0 and nothing follows.
pub fn fragment(id: u32, start: usize, more: bool) -> (u8, Vec<u8>) {
    let offset = (start as u16 & 0xfff8) | u16::from(more);
    (FRAGMENT, [&[0, 0][..], &offset.to_be_bytes(), &id.to_be_bytes()].concat())
}

/// A payload in IPv6 fragments that begin at these offsets (multiples of eight); the first is 0.
pub fn v6_fragments(flow: Flow, protocol: u8, payload: &[u8], starts: &[usize]) -> Vec<Vec<u8>> {
    let piece = |index: usize| {
        let (start, end) = (starts[index], starts.get(index + 1).copied().unwrap_or(payload.len()));
        let header = fragment(flow.from.port().into(), start, end < payload.len());
        v6(flow, &[header], protocol, &payload[start..end])
    };
    (0..starts.len()).map(piece).collect()
}

/// The checksum of a TCP or UDP header with its pseudo header.
fn checksum(flow: Flow, protocol: u8, bytes: &[u8]) -> [u8; 2] {
    let pseudo = sum_of(&octets(flow.from.ip())) + sum_of(&octets(flow.to.ip()));
    fold(pseudo + u64::from(protocol) + bytes.len() as u64 + sum_of(bytes))
}

fn sum_of(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum()
}

fn fold(mut sum: u64) -> [u8; 2] {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What came back on a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A TCP segment.
    Tcp {
        /// Its flags.
        flags: u8,
        /// Its sequence number.
        seq: u32,
        /// What it acknowledges.
        ack: u32,
        /// Its options.
        options: Vec<u8>,
        /// What it carries.
        data: Vec<u8>,
    },
    /// A UDP datagram.
    Udp(Vec<u8>),
    /// An answer to a ping.
    Pong,
}

/// Reads a packet as an answer on a flow; `None` where it is none. Answers have no extension headers.
pub fn heard(flow: Flow, packet: &[u8]) -> Option<Heard> {
    let (protocol, header, from, to) = match packet.first()? >> 4 {
        4 => (*packet.get(9)?, usize::from(packet[0] & 15) * 4, packet.get(12..16)?, packet.get(16..20)?),
        6 => (*packet.get(6)?, 40, packet.get(8..24)?, packet.get(24..40)?),
        _ => return None,
    };
    if from != octets(flow.to.ip()) || to != octets(flow.from.ip()) {
        return None;
    }
    // The frame may be padded behind the packet.
    let length =
        u16::from_be_bytes(packet.get(if header == 40 && packet[0] >> 4 == 6 { 4..6 } else { 2..4 })?.try_into().ok()?);
    let end = usize::from(length) + if packet[0] >> 4 == 6 { 40 } else { 0 };
    let payload = packet.get(header..end.min(packet.len()))?;
    let number = |at: usize| Some(u32::from_be_bytes(payload.get(at..at + 4)?.try_into().ok()?));
    let ports = [flow.to.port().to_be_bytes(), flow.from.port().to_be_bytes()].concat();
    match protocol {
        6 if payload.get(..4)? == ports => {
            let offset = usize::from(payload.get(12)? >> 4) * 4;
            Some(Heard::Tcp {
                flags: *payload.get(13)?,
                seq: number(4)?,
                ack: number(8)?,
                options: payload.get(20..offset)?.to_vec(),
                data: payload.get(offset..)?.to_vec(),
            })
        }
        17 if payload.get(..4)? == ports => Some(Heard::Udp(payload.get(8..)?.to_vec())),
        1 if *payload.first()? == 0 => Some(Heard::Pong),
        58 if *payload.first()? == 129 => Some(Heard::Pong),
        _ => None,
    }
}
