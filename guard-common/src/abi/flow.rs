//! Owns flows and what opens them: the keys and values of pinholes, of registered sockets and of UDP conversations.
//! Called by `openings`, which opens them, by `decide`, which asks for them, and by the daemon, which registers its sockets.
//! Must never hold a number of a ruleset: a pinhole means the same after an edit.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::capacity::OPENER_SLOTS;

/// An address of either family: IPv4 in its mapped form `::ffff:a.b.c.d`, network order.
pub type Address = [u8; 16];

/// The number of leading bytes of a mapped IPv4 address.
pub const V4_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// One direction of a conversation, as the listener sees it: the key of a pinhole.
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

/// What opened a pinhole: the value of the pinhole, of the cookie tables and of a UDP conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Pinhole {
    /// A set of `Pinhole::*`; any other bit admits nothing.
    pub via: u32,
    /// When a UDP conversation was last used, in seconds of `CLOCK_MONOTONIC`.
    pub at: u32,
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
    /// A UDP conversation that the guarded socket itself opened: what it receives is a reply.
    pub const REPLY: u32 = 8;
    /// A UDP conversation that a peer opened and a rule admitted: the socket's answer does not make the next datagram a reply.
    pub const SERVED: u32 = 16;

    /// A pinhole that says only what opened it.
    pub const fn of(via: u32) -> Pinhole {
        Pinhole { via, at: 0, cgroup: 0 }
    }
}

/// The index of an address's mark. A mark is set before a pinhole and never removed: an address without a mark has no pinhole, so a
/// stranger's packet needs no look-up in a table that is too large for the processor's cache.
#[inline(always)]
pub fn opener_slot(address: &Address) -> u32 {
    let all = u128::from_ne_bytes(*address);
    let hash = ((all >> 64) as u64 ^ all as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> 53) as u32
}
const _: () = assert!(OPENER_SLOTS == 1 << (u64::BITS - 53));
