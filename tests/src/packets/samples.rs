//! Owns the packets of the comparison: random ones, and the edges by name.
//! Called by `agree`.
//! Must never leave an edge to chance: random bytes almost never set the one bit that matters.

use std::net::{IpAddr, SocketAddr};

use guard_common::packet::{TCP, mapped};
use rand::{Rng, rngs::StdRng};

use super::{Flow, ip, syn, v4};

/// A packet from its IP header on, with what it stands for.
pub struct Sample {
    /// What it stands for.
    pub name: &'static str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The port that the samples go to.
const PORT: u16 = 10_250;

/// Every edge that somebody thought of, by name.
pub fn named(
    source_v4: [u8; 4],
    destination_v4: [u8; 4],
    source_v6: [u8; 16],
    destination_v6: [u8; 16],
) -> Vec<Sample> {
    let flow_v4 = flow(source_v4, destination_v4, 40_000);
    let packets = [syn_of(flow_v4, 5), syn_of(flow(source_v6, destination_v6, 40_000), 5)];
    // A SYN of a family, with these bytes in place of its own.
    let edited = |name, family: usize, at: usize, bytes: &[u8]| {
        let mut packet = packets[family].clone();
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        Sample { name, bytes: packet }
    };
    let v4 = |name, at, bytes: &[u8]| edited(name, 0, at, bytes);
    let v6 = |name, at, bytes: &[u8]| edited(name, 1, at, bytes);
    let cut = |sample: Sample, length: usize| Sample { bytes: sample.bytes[..length].to_vec(), ..sample };
    vec![
        v4("IPv4 SYN", 0, &[]),
        v6("IPv6 SYN", 0, &[]),
        Sample { name: "IPv4 options, 24-byte header", bytes: syn_of(flow_v4, 6) },
        Sample { name: "IPv4 options, 60-byte header", bytes: syn_of(flow_v4, 15) },
        v4("IHL 4", 0, &[0x44]),
        v4("IHL 0", 0, &[0x40]),
        cut(v4("IHL past the end", 0, &[0x4f]), 40),
        v4("more fragments", 6, &[0x20]),
        v4("fragment offset 1", 7, &[1]),
        v4("fragment offset in the high byte", 6, &[0x1f]),
        v4("don't fragment", 6, &[0x40]),
        v4("reserved flag", 6, &[0x80]),
        v4("UDP", 9, &[17]),
        v4("ICMP", 9, &[1]),
        v4("unknown protocol", 9, &[253]),
        cut(v4("TCP header cut after one byte", 0, &[]), 21),
        cut(v4("TCP header cut after the source port", 0, &[]), 22),
        cut(v4("IPv4 header alone", 0, &[]), 20),
        v4("source port 0", 20, &[0, 0]),
        v4("source port = guarded port", 20, &PORT.to_be_bytes()),
        v4("version 0", 0, &[0x05]),
        v4("version 5", 0, &[0x55]),
        v4("version 15", 0, &[0xf5]),
        v4("IPv6 version nibble on an IPv4 packet", 0, &[0x65]),
        v4("source = destination", 12, &destination_v4),
        v4("IPv4 source 0.0.0.0", 12, &[0; 4]),
        v4("IPv4 source broadcast", 12, &[0xff; 4]),
        v6("IPv6 hop-by-hop", 6, &[0]),
        v6("IPv6 destination options", 6, &[60]),
        v6("IPv6 routing header", 6, &[43]),
        v6("IPv6 fragment header", 6, &[44]),
        v6("IPv6 UDP", 6, &[17]),
        v6("IPv6 no next header", 6, &[59]),
        cut(v6("IPv6 header cut", 0, &[]), 39),
        cut(v6("IPv6 header alone", 0, &[]), 40),
        cut(v6("IPv6 TCP cut after one byte", 0, &[]), 41),
        v6("IPv6 mapped source", 8, &mapped([10, 0, 8, 5])),
        v6("IPv6 mapped destination", 24, &mapped([10, 0, 0, 1])),
        v6("IPv6 source ::", 8, &[0; 16]),
    ]
}

/// A packet with addresses from the pools, and now and then a wrong byte or a cut.
pub fn random(rng: &mut StdRng, pool_v4: &[[u8; 4]], pool_v6: &[[u8; 16]]) -> Sample {
    let port = pick(rng, &[0u16, 1, 80, 8080, PORT, 40_000, 40_001, 65_535]);
    let mut bytes = if rng.random_bool(0.5) {
        let words = pick(rng, &[5, 5, 5, 6, 10, 15]);
        syn_of(flow(pick(rng, pool_v4), pick(rng, pool_v4), port), words)
    } else {
        syn_of(flow(pick(rng, pool_v6), pick(rng, pool_v6), port), 5)
    };
    if rng.random_bool(0.3) {
        let at = rng.random_range(0..bytes.len().min(44));
        bytes[at] = rng.random();
    }
    if rng.random_bool(0.15) {
        // A flags byte with one bit set: fragments, and the bits beside them.
        bytes[6] = 1 << rng.random_range(0..8);
    }
    if rng.random_bool(0.1) {
        bytes.truncate(rng.random_range(0..bytes.len()));
    }
    Sample { name: "random", bytes }
}

/// One of several.
pub fn pick<T: Copy>(rng: &mut StdRng, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

fn flow(from: impl Into<IpAddr>, to: impl Into<IpAddr>, port: u16) -> Flow {
    Flow { from: SocketAddr::new(from.into(), port), to: SocketAddr::new(to.into(), PORT) }
}

/// A SYN; of IPv4 with a header of so many words.
fn syn_of(flow: Flow, words: usize) -> Vec<u8> {
    let segment = syn(flow, 0);
    if words > 5 { v4(flow, TCP, &vec![0; (words - 5) * 4], &segment) } else { ip(flow, TCP, &segment) }
}
