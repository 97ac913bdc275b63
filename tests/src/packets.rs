//! Owns the packets of the comparison: random ones, and the edges by name.
//! Called by `agree`.
//! Must never leave an edge to chance: random bytes almost never set the one bit that matters.

use rand::{Rng, rngs::StdRng};

/// A packet from its IP header on, with what it stands for.
pub struct Sample {
    /// What it stands for.
    pub name: &'static str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Every edge that somebody thought of, by name.
pub fn named(
    source_v4: [u8; 4],
    destination_v4: [u8; 4],
    source_v6: [u8; 16],
    destination_v6: [u8; 16],
) -> Vec<Sample> {
    let v4 = |edit: fn(&mut Vec<u8>)| {
        let mut bytes = tcp_v4(source_v4, destination_v4, 5, 40_000, 10_250);
        edit(&mut bytes);
        bytes
    };
    let v6 = |edit: fn(&mut Vec<u8>)| {
        let mut bytes = tcp_v6(source_v6, destination_v6, 40_000, 10_250);
        edit(&mut bytes);
        bytes
    };
    let samples: Vec<(&'static str, Vec<u8>)> = vec![
        ("IPv4 SYN", v4(|_| {})),
        ("IPv6 SYN", v6(|_| {})),
        ("IPv4 options, 24-byte header", tcp_v4(source_v4, destination_v4, 6, 40_000, 10_250)),
        ("IPv4 options, 60-byte header", tcp_v4(source_v4, destination_v4, 15, 40_000, 10_250)),
        ("IHL 4", v4(|bytes| bytes[0] = 0x44)),
        ("IHL 0", v4(|bytes| bytes[0] = 0x40)),
        (
            "IHL past the end",
            v4(|bytes| {
                bytes[0] = 0x4f;
                bytes.truncate(40);
            }),
        ),
        ("more fragments", v4(|bytes| bytes[6] = 0x20)),
        ("fragment offset 1", v4(|bytes| bytes[7] = 1)),
        ("fragment offset in the high byte", v4(|bytes| bytes[6] = 0x1f)),
        ("don't fragment", v4(|bytes| bytes[6] = 0x40)),
        ("reserved flag", v4(|bytes| bytes[6] = 0x80)),
        ("UDP", v4(|bytes| bytes[9] = 17)),
        ("ICMP", v4(|bytes| bytes[9] = 1)),
        ("unknown protocol", v4(|bytes| bytes[9] = 253)),
        ("TCP header cut after one byte", v4(|bytes| bytes.truncate(21))),
        ("TCP header cut after the source port", v4(|bytes| bytes.truncate(22))),
        ("IPv4 header alone", v4(|bytes| bytes.truncate(20))),
        ("source port 0", v4(|bytes| bytes[20..22].fill(0))),
        ("source port = guarded port", v4(|bytes| bytes[20..22].copy_from_slice(&10_250u16.to_be_bytes()))),
        ("version 0", v4(|bytes| bytes[0] = 0x05)),
        ("version 5", v4(|bytes| bytes[0] = 0x55)),
        ("version 15", v4(|bytes| bytes[0] = 0xf5)),
        ("IPv6 version nibble on an IPv4 packet", v4(|bytes| bytes[0] = 0x65)),
        ("source = destination", v4(|bytes| bytes.copy_within(16..20, 12))),
        ("IPv4 source 0.0.0.0", v4(|bytes| bytes[12..16].fill(0))),
        ("IPv4 source broadcast", v4(|bytes| bytes[12..16].fill(0xff))),
        ("IPv6 hop-by-hop", v6(|bytes| bytes[6] = 0)),
        ("IPv6 destination options", v6(|bytes| bytes[6] = 60)),
        ("IPv6 routing header", v6(|bytes| bytes[6] = 43)),
        ("IPv6 fragment header", v6(|bytes| bytes[6] = 44)),
        ("IPv6 UDP", v6(|bytes| bytes[6] = 17)),
        ("IPv6 no next header", v6(|bytes| bytes[6] = 59)),
        ("IPv6 header cut", v6(|bytes| bytes.truncate(39))),
        ("IPv6 header alone", v6(|bytes| bytes.truncate(40))),
        ("IPv6 TCP cut after one byte", v6(|bytes| bytes.truncate(41))),
        ("IPv6 mapped source", v6(|bytes| bytes[8..24].copy_from_slice(&mapped([10, 0, 8, 5])))),
        ("IPv6 mapped destination", v6(|bytes| bytes[24..40].copy_from_slice(&mapped([10, 0, 0, 1])))),
        ("IPv6 source ::", v6(|bytes| bytes[8..24].fill(0))),
    ];
    samples.into_iter().map(|(name, bytes)| Sample { name, bytes }).collect()
}

/// A packet with addresses from the pools, and now and then a wrong byte or a cut.
pub fn random(rng: &mut StdRng, pool_v4: &[[u8; 4]], pool_v6: &[[u8; 16]]) -> Sample {
    let port = pick(rng, &[0u16, 1, 80, 8080, 10_250, 40_000, 40_001, 65_535]);
    let mut bytes = if rng.random_bool(0.5) {
        let words = pick(rng, &[5u8, 5, 5, 6, 10, 15]);
        tcp_v4(pick(rng, pool_v4), pick(rng, pool_v4), words, port, 10_250)
    } else {
        tcp_v6(pick(rng, pool_v6), pick(rng, pool_v6), port, 10_250)
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

fn tcp_v4(source: [u8; 4], destination: [u8; 4], words: u8, source_port: u16, port: u16) -> Vec<u8> {
    let header = usize::from(words) * 4;
    let mut bytes = vec![0u8; header + 20];
    bytes[0] = 0x40 | words;
    let total = bytes.len() as u16;
    bytes[2..4].copy_from_slice(&total.to_be_bytes());
    bytes[8] = 64;
    bytes[9] = 6;
    bytes[12..16].copy_from_slice(&source);
    bytes[16..20].copy_from_slice(&destination);
    tcp(&mut bytes[header..], source_port, port);
    bytes
}

fn tcp_v6(source: [u8; 16], destination: [u8; 16], source_port: u16, port: u16) -> Vec<u8> {
    let mut bytes = vec![0u8; 60];
    bytes[0] = 0x60;
    bytes[5] = 20;
    bytes[6] = 6;
    bytes[7] = 64;
    bytes[8..24].copy_from_slice(&source);
    bytes[24..40].copy_from_slice(&destination);
    tcp(&mut bytes[40..], source_port, port);
    bytes
}

fn tcp(header: &mut [u8], source_port: u16, port: u16) {
    header[0..2].copy_from_slice(&source_port.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[12] = 0x50;
    header[13] = 0x02;
}

fn mapped(v4: [u8; 4]) -> [u8; 16] {
    guard_common::packet::mapped(v4)
}
