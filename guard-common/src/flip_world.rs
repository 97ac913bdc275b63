//! Owns the tables of `flip_tests`: two rulesets, a situation, and the look-up before which the second ruleset becomes active.
//! Called by `flip_tests`.
//! Must never judge: it answers look-ups and counts them.

use std::{cell::Cell, collections::BTreeMap};

use crate::{
    Ancestors, CgroupLookups, DestinationLookups, Listener, Lookups, Namespace, PacketSocket, RulesetSwitch,
    abi::{
        Address, AskedKey, CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey, DestinationValue, FlowKey,
        Generation, LIST_BITS, NamespaceKey, NamespaceValue, PeerKey4, PeerKey6, PeerValue, Pinhole, PortKey,
        PortValue, ScopeKey, ScopeValue, SentDatagram,
    },
    packet::{UDP, mapped},
};

/// One ruleset as the tables hold it. Prefixes are whole addresses: the longest match is the business of the maps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    pub(crate) features: u32,
    pub(crate) pods_cgroup: u64,
    pub(crate) scopes: BTreeMap<Address, u32>,
    pub(crate) ports: BTreeMap<(u32, u16, u8), PortValue>,
    pub(crate) peers: BTreeMap<(u32, Address), PeerValue>,
    pub(crate) callers: BTreeMap<(u32, u64), u32>,
    pub(crate) cgroups: BTreeMap<u64, u32>,
    pub(crate) destinations: BTreeMap<(u32, Address), u32>,
    /// The scope of the listener's network namespace.
    pub(crate) namespace: Option<u32>,
}

/// The situation that both rulesets judge.
#[derive(Clone, Debug)]
pub(crate) struct Situation {
    pub(crate) packet: Vec<u8>,
    pub(crate) namespace: Namespace,
    pub(crate) port: u16,
    pub(crate) protocol: u8,
    /// The cgroups around the socket and the process, from the outermost.
    pub(crate) around: Vec<u64>,
    pub(crate) pinhole: Option<Pinhole>,
    pub(crate) sent: Option<SentDatagram>,
    pub(crate) has_asked: bool,
    pub(crate) over_loopback: bool,
    pub(crate) noted: Option<Pinhole>,
    pub(crate) to: Address,
}

/// Both rulesets in the tables, and when the second becomes active.
pub(crate) struct World<'a> {
    pub(crate) rules: [&'a Rules; 2],
    /// The epoch of the first; the second has the next.
    pub(crate) epoch: u32,
    pub(crate) situation: &'a Situation,
    /// The number of look-ups that are answered before the switch.
    pub(crate) flip_after: usize,
    pub(crate) done: Cell<usize>,
    pub(crate) reads: Cell<usize>,
}

impl World<'_> {
    /// Counts a look-up.
    pub(crate) fn look(&self) {
        self.done.set(self.done.get() + 1);
    }

    fn rules(&self, generation: u8) -> &Rules {
        self.look();
        self.rules[usize::from(generation != (self.epoch & 1) as u8)]
    }

    fn listed(&self, list: [u8; 4]) -> (&Rules, u32) {
        let list = u32::from_be_bytes(list);
        (self.rules((list >> LIST_BITS) as u8), list & !(1 << LIST_BITS))
    }
}

impl RulesetSwitch for World<'_> {
    fn active(&self) -> u32 {
        let flipped = self.done.get() >= self.flip_after;
        self.reads.set(self.reads.get() + 1);
        self.look();
        self.epoch + u32::from(flipped)
    }
    fn generation(&self, number: u8) -> Generation {
        let Rules { pods_cgroup, features, .. } = *self.rules(number);
        let epoch = self.epoch + u32::from(number != (self.epoch & 1) as u8);
        Generation { pods_cgroup, features, epoch, ..Generation::default() }
    }
}

impl Lookups for World<'_> {
    fn scope(&self, key: &ScopeKey) -> Option<ScopeValue> {
        self.rules(key.generation[0]).scopes.get(&key.address).map(|scope| ScopeValue { scope: *scope })
    }
    fn port(&self, key: &PortKey) -> Option<PortValue> {
        self.rules(key.generation).ports.get(&(key.scope, key.port, key.protocol)).copied()
    }
    fn is_guarded_number(&self, generation: u8, port: u16) -> bool {
        self.rules(generation).ports.keys().any(|(_, number, _)| *number == port)
    }
    fn scope_copy(&self, key: &ScopeKey) -> Option<ScopeValue> {
        self.scope(key)
    }
    fn port_copy(&self, key: &PortKey) -> Option<PortValue> {
        self.port(key)
    }
    fn namespace_scope(&self, key: &NamespaceKey) -> Option<NamespaceValue> {
        self.rules(key.generation as u8).namespace.map(|scope| NamespaceValue { scope })
    }
    fn pinhole(&self, _: &FlowKey) -> Option<Pinhole> {
        self.look();
        self.situation.pinhole
    }
    fn sent(&self, _: &FlowKey) -> Option<SentDatagram> {
        self.look();
        self.situation.sent
    }
    fn asked(&self, _: &AskedKey) -> bool {
        self.look();
        self.situation.has_asked
    }
    fn caller(&self, key: &CallerKey) -> Option<CallerValue> {
        let (rules, list) = self.listed(key.list);
        rules.callers.get(&(list, key.cgroup)).map(|rule| CallerValue { rule: *rule })
    }
    fn peer_v4(&self, key: &PeerKey4) -> Option<PeerValue> {
        let (rules, list) = self.listed(key.list);
        rules.peers.get(&(list, mapped(key.address))).copied()
    }
    fn peer_v6(&self, key: &PeerKey6) -> Option<PeerValue> {
        let (rules, list) = self.listed(key.list);
        rules.peers.get(&(list, key.address)).copied()
    }
}

impl CgroupLookups for World<'_> {
    fn cgroup(&self, key: &CgroupKey) -> Option<CgroupValue> {
        self.rules(key.generation as u8).cgroups.get(&key.cgroup).map(|roles| CgroupValue { roles: *roles })
    }
}

impl DestinationLookups for World<'_> {
    fn destination(&self, key: &DestinationKey) -> Option<DestinationValue> {
        let (rules, list) = self.listed(key.list);
        rules.destinations.get(&(list, key.address)).map(|set| DestinationValue { set: *set })
    }
    fn has_port(&self, key: &PortKey) -> bool {
        self.port(key).is_some()
    }
}

impl Ancestors for World<'_> {
    fn cgroup_at(&self, level: u32) -> u64 {
        self.look();
        self.situation.around.get(level as usize - 1).copied().unwrap_or_default()
    }
}

impl PacketSocket for World<'_> {
    fn namespace(&self) -> (Namespace, u64) {
        self.look();
        (self.situation.namespace, 9)
    }
    fn cookie(&self) -> u64 {
        self.look();
        11
    }
    fn is_udp(&self) -> bool {
        self.look();
        self.situation.protocol == UDP
    }
    fn interface(&self) -> u32 {
        self.look();
        if self.situation.over_loopback { Listener::LOOPBACK_INTERFACE } else { 2 }
    }
}
