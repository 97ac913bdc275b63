//! Owns flows and what opens them: the keys and values of pinholes, of registered sockets and of datagrams.
//! Called by `openings`, which opens them, by `decide`, which asks for them, and by the daemon, which registers its sockets.
//! Must never hold a number of a ruleset: a pinhole means the same after an edit.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::capacity::{OPENER_SLOTS, UDP_FLOW_SECONDS};

/// An address of either family: IPv4 in its mapped form `::ffff:a.b.c.d`, network order.
pub type Address = [u8; 16];

/// The number of leading bytes of a mapped IPv4 address.
pub const V4_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// One direction of a connection, as the listener sees it: the key of a pinhole and of a sent datagram.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct FlowKey {
    /// The address that connects.
    pub source: Address,
    /// The address that it connects to.
    pub destination: Address,
    /// Network order.
    pub source_port: [u8; 2],
    /// Network order.
    pub destination_port: [u8; 2],
}
const _: () = assert!(size_of::<FlowKey>() == 36);

/// What opened a pinhole: the value of the pinhole and of the cookie tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Pinhole {
    /// A set of `Pinhole::*`; any other bit admits nothing.
    pub via: u32,
    /// Zero: it takes the place of padding.
    pub reserved: u32,
    /// With [`Pinhole::CALLER`]: the id of the named cgroup that the caller is in.
    pub cgroup: u64,
}
const _: () = assert!(size_of::<Pinhole>() == 16);

impl Pinhole {
    /// A dial that the daemon, or the companion, made.
    pub const TUNNEL: u32 = 1;
    /// A connection opened in the node's own network namespace.
    pub const NODE: u32 = 2;
    /// A connection opened by a process in a cgroup that the policy names.
    pub const CALLER: u32 = 4;

    /// A pinhole that says only what opened it.
    pub const fn of(via: u32) -> Pinhole {
        Pinhole { via, reserved: 0, cgroup: 0 }
    }
}

/// A datagram on its way from a socket of this node to a guarded port: the value of its flow. The sender's every datagram writes it anew,
/// so it only has to last until the receiver has the datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SentDatagram {
    /// With [`Pinhole::CALLER`]: the id of the named cgroup that the sender is in.
    pub cgroup: u64,
    /// The cookie of the sender's network namespace.
    pub netns: u64,
    /// When it was sent, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// [`Pinhole::NODE`], [`Pinhole::CALLER`], or both.
    pub via: u32,
    /// Zero: it takes the place of padding.
    pub reserved: u32,
}
const _: () = assert!(size_of::<SentDatagram>() == 32);

/// The key of what a guarded UDP socket has asked: the socket and the remote side, so that only this very socket gets the answer.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AskedKey {
    /// The cookie of the socket (`SO_COOKIE`).
    pub socket: u64,
    /// The remote address.
    pub address: Address,
    /// The remote port, network order.
    pub port: [u8; 2],
    /// Zero: it takes the place of padding.
    pub reserved: [u8; 6],
}
const _: () = assert!(size_of::<AskedKey>() == 32);

/// When a guarded UDP socket last sent to a remote side that had not spoken first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Asked {
    /// Seconds of `CLOCK_MONOTONIC`.
    pub at: u32,
}

/// Who has spoken first to a guarded UDP socket: the memory of one socket, which nobody else can fill. For each hash of a remote side it
/// holds the window of time in which that side last spoke. What two remote sides share only withholds a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Spoken {
    /// The windows, by [`Spoken::slot`]; 0 means never.
    pub windows: [u8; Spoken::SLOTS],
}

impl Spoken {
    /// Remote sides that one socket tells apart.
    pub const SLOTS: usize = 4096;
    /// Seconds of one window. A remote side counts as having spoken in the window of its last datagram and in the next one.
    pub const WINDOW_SECONDS: u32 = UDP_FLOW_SECONDS;

    /// The slot of a remote side.
    #[inline(always)]
    pub fn slot(address: &Address, port: [u8; 2]) -> usize {
        let port = u64::from(u16::from_ne_bytes(port));
        (hash(address, port) >> 52) as usize
    }

    /// The window of a second; never 0.
    #[inline(always)]
    pub const fn window(second: u32) -> u8 {
        ((second / Spoken::WINDOW_SECONDS % 255) as u8).wrapping_add(1)
    }

    /// Whether what was noted in window `noted` still counts at this second.
    #[inline(always)]
    pub const fn counts(noted: u8, second: u32) -> bool {
        noted != 0
            && (noted == Spoken::window(second) || noted == Spoken::window(second.wrapping_sub(Spoken::WINDOW_SECONDS)))
    }
}
const _: () = assert!(Spoken::SLOTS == 1 << (u64::BITS - 52));

/// The index of an address's mark. A mark is set before a pinhole and never removed: an address without a mark has no pinhole, so a
/// stranger's packet needs no look-up in a table that is too large for the processor's cache.
#[inline(always)]
pub fn opener_slot(address: &Address) -> u32 {
    (hash(address, 0) >> 53) as u32
}

/// A hash whose highest bits depend on every bit of the address and of `salt`.
#[inline(always)]
fn hash(address: &Address, salt: u64) -> u64 {
    let all = u128::from_ne_bytes(*address);
    ((all >> 64) as u64 ^ all as u64 ^ (salt << 17)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
const _: () = assert!(OPENER_SLOTS == 1 << (u64::BITS - 53));
