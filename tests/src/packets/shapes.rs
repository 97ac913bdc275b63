//! Owns the shapes that packets to a guarded port can have, each by name: how it is sent, and what becomes of it.
//! Called by `judged`, for the lab (over a real interface, to the node and into a pod) and by `nodeguard-guest` (over loopback, in other kernels).
//! Must never leave out what Linux drops by itself: on another kernel it may not.

use guard_common::packet::{TCP, UDP, mapped};

use super::{
    ACK, DESTINATION_OPTIONS, FIN, Flow, HOP_BY_HOP, PSH, ROUTING, RST, SYN, Segment, URG, fragment, ip, padding, ping,
    seal, tcp, udp, v4, v4_fragment, v4_fragments, v6, v6_fragments,
};

/// What comes back where the guard lets a shape through: what Linux makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The handshake goes on.
    SynAck,
    /// It is refused by the listener.
    Rst,
    /// The echo server's datagram.
    Datagram,
    /// Nothing: it is dropped before or behind the guard, or is no question.
    Nothing,
    /// An answer to a ping.
    Pong,
}

/// A shape.
pub struct Shape {
    /// What it is; docs/packets.md names it the same.
    pub name: &'static str,
    /// IPv6.
    pub v6: bool,
    /// The IP protocol whose listener is tried.
    pub protocol: u8,
    /// The packets, in the order in which they are sent.
    pub packets: fn(Flow) -> Vec<Vec<u8>>,
    /// What Linux makes of it.
    pub answer: Answer,
    /// How many packets the guard judges: none where Linux drops the shape by itself, one where it puts fragments together.
    pub judged: u64,
    /// Whether its source port can be read, so that it can have a pinhole.
    pub has_port: bool,
}

/// A shape's packets from a flow.
type Packets = fn(Flow) -> Vec<Vec<u8>>;

fn syn(flow: Flow) -> Vec<u8> {
    syn_with(flow, &[], &[])
}

fn syn_with(flow: Flow, options: &[u8], data: &[u8]) -> Vec<u8> {
    tcp(flow, Segment { flags: SYN, seq: 1000, options, data, ..Segment::default() })
}

/// A SYN of 40 bytes: five pieces of eight.
fn long_syn(flow: Flow) -> Vec<u8> {
    syn_with(flow, &[1; 20], &[])
}

fn whole(flow: Flow, segment: &[u8]) -> Vec<Vec<u8>> {
    vec![ip(flow, TCP, segment)]
}

fn options(flow: Flow, options: &[u8], data: &[u8]) -> Vec<Vec<u8>> {
    whole(flow, &syn_with(flow, options, data))
}

fn flags(flow: Flow, flags: u8) -> Vec<Vec<u8>> {
    whole(flow, &tcp(flow, Segment { flags, seq: 1000, ack: 77, ..Segment::default() }))
}

fn v4_options(flow: Flow, options: &[u8]) -> Vec<Vec<u8>> {
    vec![v4(flow, TCP, options, &syn(flow))]
}

/// A SYN with a byte of its IP header changed, the checksum being good.
fn header_byte(flow: Flow, at: usize, byte: u8) -> Vec<Vec<u8>> {
    let mut packet = ip(flow, TCP, &syn(flow));
    packet[at] = byte;
    if flow.to.is_ipv4() {
        seal(&mut packet);
    }
    vec![packet]
}

/// A SYN with a byte of its TCP header changed, which makes its checksum wrong.
fn segment_byte(flow: Flow, at: usize, change: fn(u8) -> u8) -> Vec<Vec<u8>> {
    let mut segment = syn(flow);
    segment[at] = change(segment[at]);
    whole(flow, &segment)
}

fn v4_pieces(flow: Flow) -> Vec<Vec<u8>> {
    v4_fragments(&v4(flow, TCP, &[], &long_syn(flow)), &[0, 8, 16, 24, 32])
}

/// The first piece holds the whole fixed header, without which Linux takes none (RFC 8200, 4.5).
fn v6_pieces(flow: Flow) -> Vec<Vec<u8>> {
    v6_fragments(flow, TCP, &syn_with(flow, &[1; 40], &[]), &[0, 24, 32, 40, 48])
}

fn reversed(mut packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    packets.reverse();
    packets
}

fn shuffled(mut packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    packets.swap(0, 2);
    packets.swap(1, 4);
    packets
}

fn v6_headers(flow: Flow, headers: &[(u8, Vec<u8>)]) -> Vec<Vec<u8>> {
    vec![v6(flow, headers, TCP, &syn(flow))]
}

/// A hop-by-hop header with the router-alert option (RFC 2711).
fn router_alert() -> (u8, Vec<u8>) {
    (HOP_BY_HOP, vec![0, 0, 5, 2, 0, 0, 1, 0])
}

/// A routing header of type 0 with so many segments left.
fn routing(left: u8) -> (u8, Vec<u8>) {
    (ROUTING, vec![0, 0, 0, left, 0, 0, 0, 0])
}

/// Fast open (RFC 7413): kind 34, the cookie, nothing where one is asked for.
pub fn fast_open(cookie: &[u8]) -> Vec<u8> {
    let mut option = vec![34, 2 + cookie.len() as u8];
    option.extend(cookie);
    option.resize(option.len().next_multiple_of(4), 1);
    option
}

/// Joins an MPTCP connection by its token (RFC 8684, 3.2).
pub fn join(token: [u8; 4]) -> Vec<u8> {
    [&[30, 12, 0x10, 1][..], &token, &[1, 2, 3, 4]].concat()
}

/// Opens an MPTCP connection of version 1.
pub const MP_CAPABLE: [u8; 4] = [30, 4, 1, 1];

/// Every shape that a packet, or its fragments, can have by itself.
pub fn all() -> Vec<Shape> {
    let shape = |name, v6, (protocol, has_port), answer, judged, packets: Packets| Shape {
        name,
        v6,
        protocol,
        packets,
        answer,
        judged,
        has_port,
    };
    // `taken`: Linux goes on with it. `dropped`: Linux drops it by itself.
    let taken = |name, packets| shape(name, false, (TCP, true), Answer::SynAck, 1, packets);
    let dropped = |name, packets| shape(name, false, (TCP, true), Answer::Nothing, 0, packets);
    let odd = |name, answer, packets| shape(name, false, (TCP, true), answer, 1, packets);
    let taken6 = |name, has_port, packets| shape(name, true, (TCP, has_port), Answer::SynAck, 1, packets);
    let dropped6 = |name, packets| shape(name, true, (TCP, true), Answer::Nothing, 0, packets);
    let datagram = |name, v6, packets| shape(name, v6, (UDP, true), Answer::Datagram, 1, packets);
    vec![
        taken("IPv4 SYN", |flow| v4_options(flow, &[])),
        taken("IPv4 record route", |flow| v4_options(flow, &[&[7, 39, 4][..], &[0; 36]].concat())),
        taken("IPv4 timestamps", |flow| v4_options(flow, &[&[68, 36, 5, 0][..], &[0; 32]].concat())),
        taken("IPv4 router alert", |flow| v4_options(flow, &[148, 4, 0, 0])),
        taken("IPv4 options up to 60 bytes", |flow| v4_options(flow, &[1; 40])),
        taken("IPv4 reserved flag", |flow| header_byte(flow, 6, 0x80)),
        dropped("IPv4 loose source route", |flow| v4_options(flow, &[131, 7, 4, 10, 0, 0, 9, 1])),
        dropped("IPv4 header length under 20", |flow| header_byte(flow, 0, 0x44)),
        dropped("IPv4 header length past the end", |flow| header_byte(flow, 0, 0x4f)),
        dropped("IPv4 bad header checksum", |flow| {
            let mut packets = v4_options(flow, &[]);
            packets[0][10] ^= 0x55;
            packets
        }),
        dropped("IPv4 header alone", |flow| whole(flow, &[])),
        dropped("IPv4 TCP header cut", |flow| whole(flow, &syn(flow)[..12])),
        taken("IPv4 fragments of 8 bytes", v4_pieces),
        taken("IPv4 fragments, last first", |flow| reversed(v4_pieces(flow))),
        taken("IPv4 fragments in any order", |flow| shuffled(v4_pieces(flow))),
        taken("IPv4 fragment twice", |flow| {
            let mut packets = v4_pieces(flow);
            packets.insert(1, packets[0].clone());
            packets
        }),
        dropped("IPv4 first fragment alone", |flow| v4_pieces(flow)[..1].to_vec()),
        dropped("IPv4 fragments that overlap", |flow| {
            let whole = v4(flow, TCP, &[], &long_syn(flow));
            [(0, 24), (16, 32), (32, 40)].map(|(start, end)| v4_fragment(&whole, start, end)).to_vec()
        }),
        taken("SYN with data", |flow| options(flow, &[], b"GET / HTTP/1.1\r\n\r\n")),
        taken("TCP fast open, cookie asked for", |flow| options(flow, &fast_open(&[]), &[])),
        taken("TCP fast open, unknown cookie and data", |flow| options(flow, &fast_open(&[7; 8]), b"x")),
        taken("SYN with every TCP option byte", |flow| options(flow, &[1; 40], &[])),
        taken("MPTCP capable", |flow| options(flow, &[&MP_CAPABLE[..], &[1; 4]].concat(), &[])),
        taken("MPTCP join to a TCP listener", |flow| options(flow, &join([1, 2, 3, 4]), &[])),
        odd("SYN-ACK at a listener", Answer::Rst, |flow| flags(flow, SYN | ACK)),
        odd("stray ACK at a listener", Answer::Rst, |flow| flags(flow, ACK)),
        odd("RST at a listener", Answer::Nothing, |flow| flags(flow, RST)),
        odd("FIN at a listener", Answer::Nothing, |flow| flags(flow, FIN)),
        odd("SYN and FIN", Answer::Nothing, |flow| flags(flow, SYN | FIN)),
        odd("no TCP flag", Answer::Nothing, |flow| flags(flow, 0)),
        odd("FIN, PSH and URG", Answer::Nothing, |flow| flags(flow, FIN | PSH | URG)),
        dropped("TCP header length past the end", |flow| segment_byte(flow, 12, |_| 0xf0)),
        dropped("TCP header length under 20", |flow| segment_byte(flow, 12, |_| 0x40)),
        dropped("bad TCP checksum", |flow| segment_byte(flow, 17, |byte| byte ^ 0x55)),
        taken("source port 0", |flow| v4_options(flow.from_port(0), &[])),
        taken("source port = guarded port", |flow| v4_options(flow.from_port(flow.to.port()), &[])),
        shape("ICMP", false, (1, false), Answer::Pong, 0, |flow| vec![ip(flow, 1, &ping(flow))]),
        shape("unknown protocol", false, (253, false), Answer::Nothing, 0, |flow| vec![ip(flow, 253, &syn(flow))]),
        taken6("IPv6 SYN", true, |flow| v6_headers(flow, &[])),
        taken6("IPv6 hop-by-hop", false, |flow| v6_headers(flow, &[padding(HOP_BY_HOP)])),
        taken6("IPv6 router alert", false, |flow| v6_headers(flow, &[router_alert()])),
        taken6("IPv6 destination options", false, |flow| v6_headers(flow, &[padding(DESTINATION_OPTIONS)])),
        taken6("IPv6 destination options twelve times", false, |flow| {
            v6_headers(flow, &vec![padding(DESTINATION_OPTIONS); 12])
        }),
        taken6("IPv6 routing header, no segments left", false, |flow| v6_headers(flow, &[routing(0)])),
        taken6("IPv6 atomic fragment", false, |flow| v6_headers(flow, &[fragment(7, 0, false)])),
        taken6("IPv6 every extension header", false, |flow| {
            let headers = [padding(HOP_BY_HOP), padding(DESTINATION_OPTIONS), routing(0), fragment(9, 0, false)];
            v6_headers(flow, &[&headers[..], &[padding(DESTINATION_OPTIONS)]].concat())
        }),
        taken6("IPv6 extension headers in another order", false, |flow| {
            v6_headers(flow, &[fragment(11, 0, false), routing(0), padding(DESTINATION_OPTIONS), routing(0)])
        }),
        dropped6("IPv6 hop-by-hop behind another", |flow| {
            v6_headers(flow, &[padding(DESTINATION_OPTIONS), padding(HOP_BY_HOP)])
        }),
        dropped6("IPv6 routing header, a segment left", |flow| v6_headers(flow, &[routing(1)])),
        dropped6("IPv6 no next header", |flow| vec![v6(flow, &[], 59, &syn(flow))]),
        dropped6("IPv6 mapped source", |flow| {
            let mut packets = v6_headers(flow, &[]);
            packets[0][8..24].copy_from_slice(&mapped([10, 0, 8, 5]));
            packets
        }),
        dropped6("IPv6 length past the end", |flow| header_byte(flow, 5, 60)),
        dropped6("IPv6 TCP header cut", |flow| whole(flow, &syn(flow)[..12])),
        taken6("IPv6 fragments", true, v6_pieces),
        dropped6("IPv6 fragments, eight bytes first", |flow| {
            v6_fragments(flow, TCP, &long_syn(flow), &[0, 8, 16, 24, 32])
        }),
        taken6("IPv6 fragments, last first", true, |flow| reversed(v6_pieces(flow))),
        taken6("IPv6 fragments in any order", true, |flow| shuffled(v6_pieces(flow))),
        dropped6("IPv6 first fragment alone", |flow| v6_pieces(flow)[..1].to_vec()),
        dropped6("IPv6 fragments that overlap", |flow| {
            let segment = long_syn(flow);
            let piece = |(start, end)| v6(flow, &[fragment(13, start, end < 40)], TCP, &segment[start..end]);
            [(0, 24), (16, 32), (32, 40)].map(piece).to_vec()
        }),
        shape("IPv6 stray ACK at a listener", true, (TCP, true), Answer::Rst, 1, |flow| flags(flow, ACK)),
        shape("ICMPv6", true, (58, false), Answer::Pong, 0, |flow| vec![ip(flow, 58, &ping(flow))]),
        datagram("UDP", false, |flow| vec![ip(flow, UDP, &udp(flow, b"hello"))]),
        datagram("UDP without a checksum", false, |flow| {
            let mut bytes = udp(flow, b"hello");
            bytes[6..8].fill(0);
            vec![ip(flow, UDP, &bytes)]
        }),
        datagram("UDP in fragments of 8 bytes", false, |flow| {
            v4_fragments(&v4(flow, UDP, &[], &udp(flow, b"hello, hello, hello")), &[0, 8, 16, 24])
        }),
        datagram("UDP behind IPv4 options", false, |flow| vec![v4(flow, UDP, &[1; 40], &udp(flow, b"hello"))]),
        shape("UDP header cut", false, (UDP, true), Answer::Nothing, 0, |flow| {
            vec![ip(flow, UDP, &udp(flow, b"")[..6])]
        }),
        shape("UDP from port 0", false, (UDP, true), Answer::Nothing, 1, |flow| {
            let flow = flow.from_port(0);
            vec![ip(flow, UDP, &udp(flow, b"hello"))]
        }),
        datagram("UDP over IPv6", true, |flow| vec![ip(flow, UDP, &udp(flow, b"hello"))]),
        datagram("UDP over IPv6, fragments last first", true, |flow| {
            reversed(v6_fragments(flow, UDP, &udp(flow, b"hello, hello, hello"), &[0, 8, 16, 24]))
        }),
        datagram("UDP behind IPv6 extension headers", true, |flow| {
            let headers = [padding(HOP_BY_HOP), padding(DESTINATION_OPTIONS), fragment(17, 0, false)];
            vec![v6(flow, &headers, UDP, &udp(flow, b"hello"))]
        }),
    ]
}

/// The flow that a shape's packets are really on: some choose their own port.
pub fn flow_of(shape: &Shape, flow: Flow) -> Flow {
    match shape.name {
        "source port 0" | "UDP from port 0" => flow.from_port(0),
        "source port = guarded port" => flow.from_port(flow.to.port()),
        _ => flow,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_names_every_shape() {
        let document = include_str!("../../../docs/packets.md");
        for shape in all() {
            assert!(document.contains(&format!("`{}`", shape.name)), "docs/packets.md does not name {:?}", shape.name);
        }
    }
}
