//! Owns the structs that cross the kernel boundary: map keys, map values, ring-buffer records, and the number of this layout.
//! Called by guard-ebpf, which reads them, and by the daemon, which writes them.
//! Must never hold a `bool`, an `Option`, a Rust enum or padding: the derives reject what is not plain bytes.

mod capacity;
mod entries;
mod flow;
mod generation;
mod observed;
mod test_run;

pub use capacity::{
    CGROUP_LEVELS, EVENTS_BYTES, MAX_ASKED, MAX_CALLERS, MAX_COOKIES, MAX_COUNTERS, MAX_DESTINATIONS,
    MAX_EARLIER_SOCKETS, MAX_NAMESPACES, MAX_OPENED, MAX_PEERS, MAX_PINHOLES, MAX_PORT_WORDS, MAX_PORTS, MAX_RULES,
    MAX_SCOPES, MAX_SENT, NO_RULE, OPENER_SLOTS, RULE_SLOTS, SENT_NANOSECONDS, UDP_FLOW_SECONDS,
};
pub use entries::{
    CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey, DestinationValue, LIST_BITS, NamespaceKey,
    NamespaceValue, PeerKey4, PeerKey6, PeerValue, PortKey, PortValue, ScopeKey, ScopeValue, list_bytes, port_word,
};
pub use flow::{Address, Asked, AskedKey, FlowKey, Pinhole, SentDatagram, Spoken, V4_PREFIX, opener_slot};
pub use generation::{Active, Generation, LoadedFacts};
pub use observed::{DenyEvent, EventSlot, HealthCounter, Judged, MAX_HEALTH, RuleName, counter_index};
pub use test_run::{Flood, Probe};

/// The number of this layout. Part of the pin directory's name (`v5`), so that maps of another ABI are never opened by mistake. Whoever
/// changes a struct or a size in this directory raises it.
pub const ABI: u32 = if cfg!(feature = "other-abi") { 1005 } else { 5 };

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
        super::Asked,
        super::AskedKey,
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
        super::LoadedFacts,
        super::NamespaceKey,
        super::NamespaceValue,
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
        super::SentDatagram,
    );
}
