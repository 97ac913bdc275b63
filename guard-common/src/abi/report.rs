//! Owns the structs of the ABI that tell what happened: counters, events, rule names, what a test run asks and answers.
//! Called by guard-ebpf's `report` and `probe`, and by guard/src/kernel to read them.
//! Must never hold what decides.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Address, FlowKey, NO_RULE, RULE_SLOTS};

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
    /// How many denials like it went untold since the last one that was told.
    pub repeats: u32,
}
const _: () = assert!(size_of::<DenyEvent>() == 56);

/// What a CPU told last of denials of one kind, or (the last slot) how much it told in this time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Told {
    /// A hash of source, port, rule and reason; in the last slot, the number of events.
    pub tag: u32,
    /// When: a second, or a time slice of the budget.
    pub window: u32,
    /// Denials like it since then.
    pub repeats: u32,
}

impl Told {
    /// Kinds of denial that a CPU keeps apart.
    pub const SLOTS: u32 = 512;
    /// Events that a CPU sends in one time slice (2^26 ns, 67 ms): about a thousand a second.
    pub const BUDGET: u32 = 64;
}

/// The packet that a CPU judged last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Judged {
    /// Where the kernel holds it; 0 once both programs have seen it.
    pub packet: u64,
    /// Which program judged it.
    pub by: u64,
}

impl Judged {
    /// The one program.
    pub const FIRST: u64 = 1;
    /// The other.
    pub const SECOND: u64 = 2;
}

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
    /// In: 1 where the listener is in the pods' cgroup.
    pub in_pods: u8,
    /// Nothing pads.
    pub reserved: [u8; 3],
}

/// The pace of the bench's flood, and what of it was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Flood {
    /// Nanoseconds from packet to packet, in the mean; zero sends as fast as it goes.
    pub pace: u64,
    /// When the next ones may leave, in nanoseconds of the monotonic clock.
    pub due: u64,
    /// How many were sent.
    pub sent: u64,
}

impl Flood {
    /// The low half of the first source's address; each following source is one more.
    pub const SOURCE: u16 = 0x1000;
    /// The first packet's identification and source port. Each following one's are one less; its port is one less again in each turn of the
    /// sources.
    pub const SOURCE_PORT: u16 = 45_000;
    /// The low half of the first sequence number; one more in each turn of the sources.
    pub const SEQUENCE: u16 = 1;
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
    /// Denials like one that was told in the same second (source, port, rule and reason).
    EventsRepeated = 2,
    /// Denials beyond the number that one CPU tells in a time.
    EventsSampled = 3,
}

impl Health {
    /// Every index.
    pub const ALL: [Health; 4] =
        [Health::EventsLost, Health::PinholesLost, Health::EventsRepeated, Health::EventsSampled];

    /// Whether it weakens the guard; the others are as meant: counters count every packet, events tell enough of them.
    pub const fn is_loss(self) -> bool {
        match self {
            Health::EventsLost | Health::PinholesLost => true,
            Health::EventsRepeated | Health::EventsSampled => false,
        }
    }

    /// The stable name, for metrics and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Health::EventsLost => "events-lost",
            Health::PinholesLost => "pinholes-lost",
            Health::EventsRepeated => "events-repeated",
            Health::EventsSampled => "events-sampled",
        }
    }
}
