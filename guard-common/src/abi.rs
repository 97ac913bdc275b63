//! Owns the structs that cross the kernel boundary: map keys, map values, ring-buffer records, and the ABI's number.
//! Called by guard-ebpf, which reads them, and by guard/src/kernel, which writes them.
//! Must never hold a `bool`, an `Option`, a Rust enum or padding: the derives refuse what is not plain bytes.

mod report;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use report::{DenyEvent, Flood, Health, Judged, MAX_HEALTH, Probe, RuleName, Told, counter_index};

/// The number of this layout. Part of the pin directory's name (`v4`): maps of another ABI are never opened by mistake.
pub const ABI: u32 = if cfg!(feature = "other-abi") { 1004 } else { 4 };

/// Rules of one policy.
pub const MAX_RULES: u32 = 1024;
/// Rule slots: a rule keeps its slot, and so its counters, for as long as its name is in the policy. Twice the rules, so that an
/// edit that renames all of them finds room beside the ones still in force.
pub const RULE_SLOTS: u32 = MAX_RULES * 2;
/// The rule slot of a decision that reached no rule.
pub const NO_RULE: u16 = RULE_SLOTS as u16;
/// Entries of the counter table: every rule slot and [`NO_RULE`], each with [`crate::Reason::SLOTS`] counters,
/// and the same again for what was only audited.
pub const MAX_COUNTERS: u32 = (RULE_SLOTS + 1) * crate::Reason::SLOTS * 2;
/// Guarded ports and ports of destinations, counted after ranges are spread out, two generations.
pub const MAX_PORTS: u32 = 1 << 18;
/// Words of the set of guarded port numbers, two generations of 65,536 bits.
pub const MAX_PORT_WORDS: u32 = 2 << 10;
/// Pod prefixes and node addresses, two generations.
pub const MAX_SCOPES: u32 = 1 << 16;
/// Peer prefixes, `cidr` and `except` alike, two generations.
pub const MAX_PEERS: u32 = 1 << 18;
/// Pinholes open at once. Full means that a new dial is refused, never that an old pinhole is lost.
pub const MAX_PINHOLES: u32 = 1 << 16;
/// Marks of addresses that opened a pinhole.
pub const OPENER_SLOTS: u32 = 1 << 11;
/// Sockets registered and not yet connected.
pub const MAX_COOKIES: u32 = 1 << 14;
/// UDP conversations that a guarded port or the node takes part in; the longest unused one makes way.
pub const MAX_UDP_FLOWS: u32 = 1 << 16;
/// How long a UDP conversation counts without a datagram from the side that opened it, in seconds: the kernel's own
/// `nf_conntrack_udp_timeout_stream`.
pub const UDP_FLOW_SECONDS: u32 = 120;
/// Cgroups that a policy names, and what they may reach, two generations.
pub const MAX_CALLERS: u32 = 1 << 14;
/// Prefixes of destinations of the hub rule and of the companion, two generations.
pub const MAX_DESTINATIONS: u32 = 1 << 16;
/// How deep below the root a named cgroup is looked for.
pub const CGROUP_LEVELS: u32 = 12;
/// Bytes of the deny events' ring buffer.
pub const EVENTS_BYTES: u32 = 1 << 20;

/// An address of either family: IPv4 in its mapped form `::ffff:a.b.c.d`, network order.
pub type Address = [u8; 16];

/// The number of leading bytes of a mapped IPv4 address.
pub const V4_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// One direction of a TCP conversation, as the listener sees it: the key of a pinhole.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct FlowKey {
    /// Who connects.
    pub source: Address,
    /// What it connects to.
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
    /// Of a UDP conversation: when it was last used, seconds of `CLOCK_MONOTONIC`.
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
    /// A UDP conversation that the guarded socket itself opened: what comes is a reply.
    pub const REPLY: u32 = 8;
    /// A UDP conversation that a peer opened and a rule admitted: what the socket answers makes no reply of the next datagram.
    pub const SERVED: u32 = 16;

    /// A pinhole that only says what opened it.
    pub const fn of(via: u32) -> Pinhole {
        Pinhole { via, at: 0, cgroup: 0 }
    }
}

/// Which mark is an address's. Marks are set before a pinhole is and never taken back: one that is not set says that this address has no
/// pinhole, and a stranger's packet is spared a look-up in a table too large for a processor's cache.
#[inline(always)]
pub fn opener_slot(address: &Address) -> u32 {
    let all = u128::from_ne_bytes(*address);
    let hash = ((all >> 64) as u64 ^ all as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> 53) as u32
}
const _: () = assert!(OPENER_SLOTS == 1 << (u64::BITS - 53));

/// Which generation of the tables is in force: the one store that makes a whole ruleset active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Active {
    /// The ruleset's epoch; 0 means that none was ever applied. Its lowest bit is the generation that keys carry.
    pub epoch: u32,
}

impl Active {
    /// The generation, 0 or 1, that every key of this epoch's entries carries.
    pub const fn generation(self) -> u8 {
        (self.epoch & 1) as u8
    }
}

/// What the programs need to know of a generation before they look anything up in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Generation {
    /// The id of the cgroup that pods live in; 0 where it is not there (yet).
    pub pods_cgroup: u64,
    /// A set of `Generation::*`.
    pub features: u32,
    /// The epoch that its entries were written for; there only while they are all there, else 0.
    pub epoch: u32,
    /// Nothing, but in a build of another ABI.
    pub reserved: [u32; Generation::SPARE],
}

impl Generation {
    /// Another size in a build of another ABI, so that an upgrade can be tried.
    const SPARE: usize = if cfg!(feature = "other-abi") { 2 } else { 0 };
    /// A UDP port is guarded.
    pub const UDP: u32 = 1;
    /// A rule guards ports of every pod.
    pub const ALL_PODS: u32 = 2;
    /// A cgroup is named: a caller or the companion.
    pub const CGROUPS: u32 = 4;
    /// There is a hub rule.
    pub const CONTROL_PLANE: u32 = 8;
    /// The whole policy only audits.
    pub const AUDIT: u32 = 16;
}

/// The data of a scope entry's LPM key (prefix length counts these bytes): whose listener is at this destination address.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct ScopeKey {
    /// The generation, as 4 bytes so that nothing pads.
    pub generation: [u8; 4],
    /// The destination address.
    pub address: Address,
}
const _: () = assert!(size_of::<ScopeKey>() == 20);

/// The value of a scope entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ScopeValue {
    /// [`ScopeValue::NODE`], or the number of a set of pod prefixes.
    pub scope: u32,
}

impl ScopeValue {
    /// The node's own listeners.
    pub const NODE: u32 = 0;
    /// The listeners of every pod, by its cgroup, at an address that no prefix holds.
    pub const ALL_PODS: u32 = (1 << 31) - 1;
    /// Added to the number of a set of destinations: in the port table, the ports that may be reached there.
    pub const DESTINATIONS: u32 = 1 << 31;
}

/// The key of a guarded port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PortKey {
    /// [`ScopeValue::scope`].
    pub scope: u32,
    /// The listener's port, host order.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// The generation.
    pub generation: u8,
}
const _: () = assert!(size_of::<PortKey>() == 8);

/// Where the set of guarded port numbers holds a port: the word's index and the bit in it.
pub const fn port_word(generation: u8, port: u16) -> (u32, u64) {
    (((generation as u32) << 10) | (port as u32 >> 6), 1 << (port & 63))
}

/// The value of a guarded port: who may reach it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortValue {
    /// The number of the peer list that the port's rules together allow, for [`PeerKey::list`].
    pub list: u32,
    /// The rule slot that a denial is counted for.
    pub rule: u16,
    /// The rule slot that an admission by `tunnel` is counted for.
    pub tunnel_rule: u16,
    /// The rule slot that an admission by `node` is counted for.
    pub node_rule: u16,
    /// A set of `PortValue::ALLOW_*` and [`PortValue::AUDIT`].
    pub flags: u16,
}
const _: () = assert!(size_of::<PortValue>() == 12);

impl PortValue {
    /// A rule of this port has the selector `tunnel`.
    pub const ALLOW_TUNNEL: u16 = 1;
    /// A rule of this port has the selector `node`.
    pub const ALLOW_NODE: u16 = 2;
    /// Every rule of this port only audits.
    pub const AUDIT: u16 = 4;
    /// A rule of this port has the selector `caller`.
    pub const ALLOW_CALLER: u16 = 8;
}

/// The data of an IPv4 peer entry's LPM key (prefix length counts these bytes).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct PeerKey4 {
    /// The peer list with its generation in the highest bit, network order.
    pub list: [u8; 4],
    /// The source address.
    pub address: [u8; 4],
}

/// The data of an IPv6 peer entry's LPM key (prefix length counts these bytes).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct PeerKey6 {
    /// The peer list with its generation in the highest bit, network order.
    pub list: [u8; 4],
    /// The source address.
    pub address: Address,
}

/// The value of a peer entry: what the longest matching prefix says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PeerValue {
    /// The rule slot that is counted.
    pub rule: u16,
    /// [`PeerValue::ALLOW`] or [`PeerValue::EXCEPT`]; any other number admits nothing.
    pub kind: u16,
}

impl PeerValue {
    /// Inside a `cidr` of some rule and no `except` of that block.
    pub const ALLOW: u16 = 1;
    /// Inside an `except` of every block that covers the address.
    pub const EXCEPT: u16 = 2;
}

/// The key of a cgroup that a peer list admits.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CallerKey {
    /// The cgroup's id: on cgroup v2, the inode of its directory.
    pub cgroup: u64,
    /// The peer list with its generation in the highest bit, network order.
    pub list: [u8; 4],
    /// Zero: nothing pads.
    pub reserved: u32,
}
const _: () = assert!(size_of::<CallerKey>() == 16);

/// The value of an admitted cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CallerValue {
    /// The rule slot that is counted.
    pub rule: u32,
}

/// The key of a cgroup that the policy names.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CgroupKey {
    /// The cgroup's id.
    pub cgroup: u64,
    /// The generation.
    pub generation: u64,
}

/// What a named cgroup is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CgroupValue {
    /// A set of `CgroupValue::*`.
    pub roles: u32,
}

impl CgroupValue {
    /// Named by a `caller`.
    pub const CALLER: u32 = 1;
    /// The companion: its connections count as `tunnel`, and it may reach nothing but its destinations.
    pub const COMPANION: u32 = 2;
}

/// The data of a destination's LPM key (prefix length counts these bytes).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct DestinationKey {
    /// [`DestinationKey::CONTROL_PLANE`] or [`DestinationKey::COMPANION`] with the generation, by [`list_bytes`].
    pub list: [u8; 4],
    /// The address.
    pub address: Address,
}

impl DestinationKey {
    /// The list of control-plane addresses.
    pub const CONTROL_PLANE: u32 = 0;
    /// The list of what the companion may reach.
    pub const COMPANION: u32 = 1;
}

/// The value of a destination prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DestinationValue {
    /// The set whose ports may be reached: with [`ScopeValue::DESTINATIONS`], a scope of the port table.
    pub set: u32,
}

/// The bits of a list number that are left for it beside the generation.
pub const LIST_BITS: u32 = 31;

/// The first four bytes of a peer key: the list with the generation in its highest bit.
pub const fn list_bytes(generation: u8, list: u32) -> [u8; 4] {
    (((generation as u32) << LIST_BITS) | (list & !(1 << LIST_BITS))).to_be_bytes()
}

#[cfg(feature = "user")]
mod user {
    macro_rules! pod {
        ($($type:ty),* $(,)?) => {$(
            // SAFETY: the zerocopy derives prove that every byte pattern is valid and that nothing pads.
            unsafe impl aya::Pod for $type {}
        )*};
    }
    pod!(
        super::Active,
        super::CallerKey,
        super::CallerValue,
        super::CgroupKey,
        super::CgroupValue,
        super::DestinationKey,
        super::DestinationValue,
        super::DenyEvent,
        super::Flood,
        super::FlowKey,
        super::Generation,
        super::Judged,
        super::PeerKey4,
        super::PeerKey6,
        super::PeerValue,
        super::Pinhole,
        super::PortKey,
        super::Probe,
        super::PortValue,
        super::RuleName,
        super::ScopeKey,
        super::ScopeValue,
    );
}
