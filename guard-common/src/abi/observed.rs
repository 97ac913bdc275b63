//! Owns what the kernel programs report and note: counters, denial events, the names of rules, the hand-over between the ingress programs.
//! Called by guard-ebpf's `report` and `ingress`, and by the daemon, which reads them.
//! Must never hold an entry that a judgement looks up.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    capacity::{NO_RULE, RULE_SLOTS},
    flow::Address,
};
use crate::verdict::Reason;

/// The index of a counter. `audited` selects the second half of the table.
pub const fn counter_index(rule: u16, reason: Reason, audited: bool) -> u32 {
    let rule = if rule > NO_RULE { NO_RULE } else { rule };
    let half = if audited { (RULE_SLOTS + 1).wrapping_mul(Reason::SLOTS) } else { 0 };
    half.wrapping_add((rule as u32).wrapping_mul(Reason::SLOTS)).wrapping_add(reason as u32)
}

/// A record of the events' ring buffer: a denial, or what would have been one (audit).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DenyEvent {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub at_ns: u64,
    /// The address that connected; zero if the header could not be read.
    pub source: Address,
    /// The address that it connected to; zero if the header could not be read.
    pub destination: Address,
    /// The epoch of the ruleset that decided.
    pub epoch: u32,
    /// Network order; zero if the TCP or UDP header could not be read.
    pub source_port: [u8; 2],
    /// The listener's port, host order.
    pub port: u16,
    /// The rule slot, or [`NO_RULE`].
    pub rule: u16,
    /// [`Reason`] as a number.
    pub reason: u8,
    /// 1 if the packet was let through because the rule only audits.
    pub audited: u8,
    /// How many events of this kind were suppressed since the last one.
    pub repeats: u32,
}
const _: () = assert!(size_of::<DenyEvent>() == 56);

/// The last event of one kind of denial on one CPU; in the last slot, the number of events in the current time slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EventSlot {
    /// A hash of source, port, rule and reason; in the last slot, the number of events.
    pub tag: u32,
    /// The second of that event; in the last slot, the time slice.
    pub window: u32,
    /// Denials of this kind since that event.
    pub repeats: u32,
}

impl EventSlot {
    /// Kinds of denial that one CPU distinguishes.
    pub const SLOTS: u32 = 512;
    /// Events that a CPU sends in one time slice (2^26 ns, 67 ms): about a thousand a second.
    pub const BUDGET: u32 = 64;
}

/// The packet that a CPU judged last: the hand-over from one ingress program to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Judged {
    /// The address of the kernel's packet buffer; 0 after both programs have seen it.
    pub packet: u64,
    /// The program that judged it.
    pub by: u64,
}

impl Judged {
    /// The first program.
    pub const FIRST: u64 = 1;
    /// The second program.
    pub const SECOND: u64 = 2;
}

/// The name of a rule slot, so that anybody who can read the maps can read the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RuleName {
    /// UTF-8, zero-padded; all zero means that the slot is free.
    pub bytes: [u8; RuleName::LEN],
}

impl RuleName {
    /// The longest rule name in bytes: the length of a DNS label, as for names in Kubernetes.
    pub const LEN: usize = 64;
}

/// Slots of the counters that [`HealthCounter`] names.
pub const MAX_HEALTH: u32 = 8;

/// The index of a counter of what the kernel half could not do or report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum HealthCounter {
    /// Denial events that did not fit into the ring buffer.
    EventsLost = 0,
    /// Pinholes and conversations that did not fit: their connection is denied.
    PinholesLost = 1,
    /// Denial events suppressed because one of the same kind (source, port, rule and reason) was sent in the same second.
    EventsRepeated = 2,
    /// Denial events dropped because this CPU's budget for the interval was spent.
    EventsSampled = 3,
}

impl HealthCounter {
    /// Every index.
    pub const ALL: [HealthCounter; 4] = [
        HealthCounter::EventsLost,
        HealthCounter::PinholesLost,
        HealthCounter::EventsRepeated,
        HealthCounter::EventsSampled,
    ];

    /// Whether it weakens the guard. The other indexes are intended: counters count every packet, events are rate-limited.
    pub const fn is_loss(self) -> bool {
        match self {
            HealthCounter::EventsLost | HealthCounter::PinholesLost => true,
            HealthCounter::EventsRepeated | HealthCounter::EventsSampled => false,
        }
    }

    /// The stable name, for metrics and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            HealthCounter::EventsLost => "events-lost",
            HealthCounter::PinholesLost => "pinholes-lost",
            HealthCounter::EventsRepeated => "events-repeated",
            HealthCounter::EventsSampled => "events-sampled",
        }
    }
}
