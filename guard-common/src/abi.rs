//! Owns the structs that cross the kernel boundary: map keys, map values, ring-buffer records, and the ABI's number.
//! Called by guard-ebpf, which reads them, and by guard/src/kernel, which writes them.
//! Must never hold a `bool`, an `Option`, a Rust enum or padding: the derives refuse what is not plain bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The number of this layout. Part of the pin directory's name (`v1`): maps of another ABI are never opened by mistake.
pub const ABI: u32 = 1;

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
/// Guarded ports, counted after ranges are spread out, two generations.
pub const MAX_PORTS: u32 = 1 << 18;
/// Pod prefixes and node addresses, two generations.
pub const MAX_SCOPES: u32 = 1 << 16;
/// Peer prefixes, `cidr` and `except` alike, two generations.
pub const MAX_PEERS: u32 = 1 << 18;
/// Pinholes open at once. Full means that a new dial is refused, never that an old pinhole is lost.
pub const MAX_PINHOLES: u32 = 1 << 16;
/// Sockets registered and not yet connected.
pub const MAX_COOKIES: u32 = 1 << 14;
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
#[repr(C)]
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

/// What opened a pinhole: the value of the pinhole and of the cookie table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Pinhole {
    /// [`Pinhole::TUNNEL`] or [`Pinhole::NODE`]; any other number admits nothing.
    pub via: u32,
}

impl Pinhole {
    /// A dial that the daemon made on a permit.
    pub const TUNNEL: u32 = 1;
    /// A connection opened in the node's own network namespace.
    pub const NODE: u32 = 2;
}

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

/// The data of a scope entry's LPM key (prefix length counts these bytes): whose listener is at this destination address.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
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
}

/// The data of an IPv4 peer entry's LPM key (prefix length counts these bytes).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
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
#[repr(C)]
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

/// The bits of a list number that are left for it beside the generation.
pub const LIST_BITS: u32 = 31;

/// The first four bytes of a peer key: the list with the generation in its highest bit.
pub const fn list_bytes(generation: u8, list: u32) -> [u8; 4] {
    (((generation as u32) << LIST_BITS) | (list & !(1 << LIST_BITS))).to_be_bytes()
}

/// The index of a counter. `audited` selects the second half of the table.
pub const fn counter_index(rule: u16, reason: crate::Reason, audited: bool) -> u32 {
    let rule = if rule > NO_RULE { NO_RULE } else { rule };
    let half = if audited { (RULE_SLOTS + 1).wrapping_mul(crate::Reason::SLOTS) } else { 0 };
    half.wrapping_add((rule as u32).wrapping_mul(crate::Reason::SLOTS)).wrapping_add(reason as u32)
}

/// One denial, or one that would have been (audit): a record of the events' ring buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DenyEvent {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at_ns: u64,
    /// Who connected; zero where the header could not be read.
    pub source: Address,
    /// What it connected to; zero where the header could not be read.
    pub destination: Address,
    /// The epoch of the ruleset that decided.
    pub epoch: u32,
    /// Network order; zero where the TCP header could not be read.
    pub source_port: [u8; 2],
    /// The listener's port, host order.
    pub port: u16,
    /// The rule slot, or [`NO_RULE`].
    pub rule: u16,
    /// [`crate::Reason`] as a number.
    pub reason: u8,
    /// 1 where the packet was let through because the rule only audits.
    pub audited: u8,
    /// Keeps the record a multiple of 8 bytes.
    pub reserved: [u8; 4],
}
const _: () = assert!(size_of::<DenyEvent>() == 56);

/// The name of a rule slot, so that counters can be read by anybody who can read the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RuleName {
    /// UTF-8, zero-padded; all zero means that the slot is free.
    pub bytes: [u8; RuleName::LEN],
}

impl RuleName {
    /// The longest rule name, in bytes: the DNS label length that Kubernetes names are held to.
    pub const LEN: usize = 64;
}

/// What a test-run entry point of the development object is told about the listener, and what it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Probe {
    /// The flow of the answer.
    pub flow: FlowKey,
    /// The epoch of the answer.
    pub epoch: u32,
    /// In: the listener's port, host order.
    pub port: u16,
    /// The rule slot of the answer.
    pub rule: u16,
    /// In: 0 node, 1 pod, any other unknown.
    pub scope: u8,
    /// In: the IP protocol number.
    pub protocol: u8,
    /// The answer's [`crate::Reason`] as a number.
    pub reason: u8,
    /// The answer: 1 where the rule only audits.
    pub audited: u8,
}

/// A slot of the loss and pressure counters ([`Health`] names the index).
pub const MAX_HEALTH: u32 = 8;

/// Index of a counter of what the kernel half could not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Health {
    /// Deny events that did not fit into the ring buffer.
    EventsLost = 0,
    /// Pinholes that did not fit: their connection is denied.
    PinholesLost = 1,
}

impl Health {
    /// Every index.
    pub const ALL: [Health; 2] = [Health::EventsLost, Health::PinholesLost];

    /// The stable name, for metrics and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Health::EventsLost => "events-lost",
            Health::PinholesLost => "pinholes-lost",
        }
    }
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
        super::DenyEvent,
        super::FlowKey,
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
