//! Owns the tables as ordinary collections, so that the judgements run on the host as they run in the kernel.
//! Called by the tests that compare the two, and to judge open connections.
//! Must never be cleverer than the kernel's maps: a longest-prefix match is a search by decreasing length.

use std::collections::{BTreeMap, BTreeSet};

use guard_common::{
    DestinationLookups, Lookups, RulesetSwitch,
    abi::{
        AskedKey, CallerKey, CallerValue, DestinationKey, DestinationValue, FlowKey, Generation, NamespaceKey,
        NamespaceValue, PeerKey4, PeerKey6, PeerValue, Pinhole, PortKey, PortValue, ScopeKey, ScopeValue, SentDatagram,
        port_word,
    },
};

use crate::tables::image::Image;

/// What the kernel looks up.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The ruleset's tables.
    pub image: Image,
    /// The open pinholes.
    pub pinholes: BTreeMap<FlowKey, Pinhole>,
    /// The datagrams on their way to a guarded port.
    pub sent: BTreeMap<FlowKey, SentDatagram>,
    /// What guarded UDP sockets asked and still await an answer to.
    pub asked: BTreeSet<AskedKey>,
}

impl RulesetSwitch for Model {
    fn active(&self) -> u32 {
        self.image.active()
    }

    fn generation(&self, number: u8) -> Generation {
        self.image.generation(number)
    }
}

impl Lookups for Model {
    fn scope(&self, key: &ScopeKey) -> Option<ScopeValue> {
        longest(&self.image.entries.scopes, key)
    }

    fn port(&self, key: &PortKey) -> Option<PortValue> {
        self.image.entries.ports.get(key).copied()
    }

    fn is_guarded_number(&self, generation: u8, port: u16) -> bool {
        let (word, bit) = port_word(generation, port);
        self.image.entries.port_numbers.get(&word).is_some_and(|word| word & bit != 0)
    }

    fn scope_copy(&self, key: &ScopeKey) -> Option<ScopeValue> {
        longest(&self.image.entries.scopes_copy, key)
    }

    fn port_copy(&self, key: &PortKey) -> Option<PortValue> {
        self.image.entries.ports_copy.get(key).copied()
    }

    fn namespace_scope(&self, key: &NamespaceKey) -> Option<NamespaceValue> {
        self.image.entries.followed.namespaces.get(key).copied()
    }

    fn pinhole(&self, key: &FlowKey) -> Option<Pinhole> {
        self.pinholes.get(key).copied()
    }

    fn sent(&self, key: &FlowKey) -> Option<SentDatagram> {
        self.sent.get(key).copied()
    }

    fn asked(&self, key: &AskedKey) -> bool {
        self.asked.contains(key)
    }

    fn caller(&self, key: &CallerKey) -> Option<CallerValue> {
        self.image.entries.followed.callers.get(key).copied()
    }

    fn peer_v4(&self, key: &PeerKey4) -> Option<PeerValue> {
        longest(&self.image.entries.peers_v4, key)
    }

    fn peer_v6(&self, key: &PeerKey6) -> Option<PeerValue> {
        longest(&self.image.entries.peers_v6, key)
    }
}

impl DestinationLookups for Model {
    fn destination(&self, key: &DestinationKey) -> Option<DestinationValue> {
        longest(&self.image.entries.destinations, key)
    }

    fn has_port(&self, key: &PortKey) -> bool {
        self.image.entries.ports.contains_key(key)
    }
}

/// The value of the longest prefix that contains the key.
fn longest<K, V>(table: &BTreeMap<(u32, K), V>, key: &K) -> Option<V>
where
    K: Copy + Ord + zerocopy::IntoBytes + zerocopy::FromBytes + zerocopy::Immutable + zerocopy::KnownLayout,
    V: Copy,
{
    let bits = size_of::<K>() as u32 * 8;
    (0..=bits).rev().find_map(|length| table.get(&(length, masked(key, length))).copied())
}

/// The key with every bit after the first `length` set to zero.
fn masked<K>(key: &K, length: u32) -> K
where
    K: Copy + zerocopy::IntoBytes + zerocopy::FromBytes + zerocopy::Immutable + zerocopy::KnownLayout,
{
    let mut key = *key;
    for (index, byte) in key.as_mut_bytes().iter_mut().enumerate() {
        let kept = length.saturating_sub(index as u32 * 8).min(8);
        *byte &= !(0xffu32 >> kept) as u8;
    }
    key
}
