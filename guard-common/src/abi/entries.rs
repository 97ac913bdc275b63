//! Owns the entries of a ruleset: keys, which carry their generation, and values.
//! Called by every judgement, and by the daemon, which writes them.
//! Must never hold an entry that means something in both generations.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::flow::Address;

/// The data of a scope entry's LPM key (the prefix length counts these bytes): whose listener is at this destination address.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct ScopeKey {
    /// The generation, as 4 bytes so that there is no padding.
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
    /// A pod whose addresses are known and lie in no prefix of a rule: the rules for every pod.
    pub const ALL_PODS: u32 = (1 << 31) - 1;
    /// A pod whose addresses are not known, at an address in no prefix of a rule. It may belong to any rule that guards pods, so its ports
    /// admit only what each of these rules admits.
    pub const OTHER_PODS: u32 = (1 << 31) - 2;
    /// Added to the number of a set of destinations: the scope of the ports that may be reached there.
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

/// Where the set of guarded port numbers holds a port: the index of the word, and the bit in it.
pub const fn port_word(generation: u8, port: u16) -> (u32, u64) {
    (((generation as u32) << 10) | (port as u32 >> 6), 1 << (port & 63))
}

/// The value of a guarded port: who may reach it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortValue {
    /// The number of the peer list that the port's rules together allow: [`PeerKey4::list`], [`PeerKey6::list`], [`CallerKey::list`].
    pub list: u32,
    /// The rule slot that a denial is counted for.
    pub rule: u16,
    /// The rule slot that an admission by `tunnel` is counted for.
    pub tunnel_rule: u16,
    /// The rule slot that an admission by `node` is counted for.
    pub node_rule: u16,
    /// A set of `PortValue::ALLOW_*` and [`PortValue::AUDIT`]; in the scope [`ScopeValue::OTHER_PODS`] also of `PortValue::OPENS_*`.
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
    /// `ALLOW_*` shifted left by this number: some rule that guards this port of pods has the selector. It says what may be opened towards
    /// a pod; only the listener says which rules are its own.
    pub const OPENS_SHIFT: u16 = 4;
}

/// The key of a network namespace whose addresses are known.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NamespaceKey {
    /// The namespace's cookie (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// The generation.
    pub generation: u64,
}

/// The value of a network namespace whose addresses are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamespaceValue {
    /// The scope of its listeners at each of its addresses; [`ScopeValue::ALL_PODS`] if no prefix of a rule contains any of them.
    pub scope: u32,
}

/// The data of an IPv4 peer entry's LPM key (the prefix length counts these bytes).
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

/// The data of an IPv6 peer entry's LPM key (the prefix length counts these bytes).
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

/// The value of a peer entry; the longest matching prefix decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PeerValue {
    /// The rule slot that is counted.
    pub rule: u16,
    /// [`PeerValue::ALLOW`] or [`PeerValue::EXCEPT`]; any other number admits nothing.
    pub kind: u16,
}

impl PeerValue {
    /// Inside a `cidr` of a rule and no `except` of that block.
    pub const ALLOW: u16 = 1;
    /// Inside an `except` of every block that contains the address.
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
    /// Zero: it takes the place of padding.
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

/// The value of a named cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CgroupValue {
    /// A set of `CgroupValue::*`.
    pub roles: u32,
}

impl CgroupValue {
    /// Named by a `caller`.
    pub const CALLER: u32 = 1;
    /// The companion: its connections count as `tunnel`, and it may reach only its destinations.
    pub const COMPANION: u32 = 2;
}

/// The data of a destination's LPM key (the prefix length counts these bytes).
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
    /// The list of destinations of the companion.
    pub const COMPANION: u32 = 1;
}

/// The value of a destination prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DestinationValue {
    /// The set whose ports may be reached; with [`ScopeValue::DESTINATIONS`] added, a scope of the port table.
    pub set: u32,
}

/// The bits of a list number; the bit above them is the generation.
pub const LIST_BITS: u32 = 31;

/// A list number as keys carry it: network order, the generation in the highest bit.
pub const fn list_bytes(generation: u8, list: u32) -> [u8; 4] {
    (((generation as u32) << LIST_BITS) | (list & !(1 << LIST_BITS))).to_be_bytes()
}
