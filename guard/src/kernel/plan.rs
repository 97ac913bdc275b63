//! Owns the step from "what the maps hold" and "what the policy wants" to map operations: a pure function.
//! Called by `apply`, at start (with what the pinned maps hold) and on every edit: there is no second path.
//! Must never touch an entry of the generation in force before the next one is active.

use std::collections::{BTreeMap, BTreeSet};

use guard_common::abi::{
    Active, PeerKey4, PeerKey6, PeerValue, PortKey, PortValue, RULE_SLOTS, ScopeKey, ScopeValue, list_bytes,
};
use ipnet::IpNet;

use crate::policy::ruleset::{Peer, PeerKind, PortRule, Ruleset};

/// The entries of the tables, both generations. An LPM key is preceded by its prefix length in bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// Destination prefixes.
    pub scopes: BTreeMap<(u32, ScopeKey), ScopeValue>,
    /// Guarded ports.
    pub ports: BTreeMap<PortKey, PortValue>,
    /// IPv4 peers.
    pub peers_v4: BTreeMap<(u32, PeerKey4), PeerValue>,
    /// IPv6 peers.
    pub peers_v6: BTreeMap<(u32, PeerKey6), PeerValue>,
}

/// Everything that the maps hold of a ruleset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// The epoch in force; 0 means that none ever was.
    pub epoch: u32,
    /// The rule slots that are taken.
    pub names: BTreeMap<u16, String>,
    /// The tables.
    pub entries: Entries,
}

/// One write to one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Gives a rule slot to a rule, its counters at zero.
    Name(u16, String),
    /// Frees a rule slot.
    Unname(u16),
    /// Writes an entry, or removes it (`None`).
    Scope((u32, ScopeKey), Option<ScopeValue>),
    /// The same for a port.
    Port(PortKey, Option<PortValue>),
    /// The same for an IPv4 peer.
    PeerV4((u32, PeerKey4), Option<PeerValue>),
    /// The same for an IPv6 peer.
    PeerV6((u32, PeerKey6), Option<PeerValue>),
    /// The one store that makes the new generation the one in force.
    Activate(u32),
    /// Waits until no program run uses the old generation any more.
    Grace,
}

/// What has to be done, and what will then be so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub ops: Vec<Op>,
    /// The epoch that is in force afterwards.
    pub epoch: u32,
    /// The rule slot of each rule, by its index in the ruleset.
    pub slots: Vec<u16>,
}

/// Why no plan could be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The ruleset has more rules than there are free slots.
    #[error("more rules than rule slots: {0} are wanted, {RULE_SLOTS} exist in all")]
    NoSlots(usize),
}

/// Plans the way from `have` to `want`. Nothing to do where `have` already says what `want` says.
pub fn plan(have: &Image, want: &Ruleset) -> Result<Plan, PlanError> {
    let slots = assign_slots(have, want)?;
    let generation = Active { epoch: have.epoch }.generation();
    let names: BTreeMap<u16, String> =
        slots.iter().zip(&want.rules).map(|(slot, rule)| (*slot, rule.name.clone())).collect();

    let mut ops = Vec::new();
    if have.epoch != 0 && have.names == names && have.entries == encode(want, &slots, generation) {
        return Ok(Plan { ops, epoch: have.epoch, slots });
    }
    // Epoch 0 means "none": a wrap skips it and keeps the generation's parity moving.
    let epoch = if have.epoch >= u32::MAX - 1 { (have.epoch & 1) ^ 3 } else { have.epoch + 1 };
    let new = Active { epoch }.generation();
    let target = encode(want, &slots, new);

    for (slot, name) in &names {
        if have.names.get(slot) != Some(name) {
            ops.push(Op::Name(*slot, name.clone()));
        }
    }
    bring(&mut ops, &have.entries, &target, new);
    ops.push(Op::Activate(epoch));
    ops.push(Op::Grace);
    bring(&mut ops, &have.entries, &Entries::default(), generation);
    for slot in have.names.keys().filter(|slot| !names.contains_key(slot)) {
        ops.push(Op::Unname(*slot));
    }
    Ok(Plan { ops, epoch, slots })
}

/// What the maps hold after an operation: the model that the tests and `apply` share.
pub fn step(image: &mut Image, op: &Op) {
    fn set<K: Ord + Copy, V: Copy>(table: &mut BTreeMap<K, V>, key: &K, value: Option<V>) {
        match value {
            Some(value) => table.insert(*key, value),
            None => table.remove(key),
        };
    }
    match op {
        Op::Name(slot, name) => {
            image.names.insert(*slot, name.clone());
        }
        Op::Unname(slot) => {
            image.names.remove(slot);
        }
        Op::Scope(key, value) => set(&mut image.entries.scopes, key, *value),
        Op::Port(key, value) => set(&mut image.entries.ports, key, *value),
        Op::PeerV4(key, value) => set(&mut image.entries.peers_v4, key, *value),
        Op::PeerV6(key, value) => set(&mut image.entries.peers_v6, key, *value),
        Op::Activate(epoch) => image.epoch = *epoch,
        Op::Grace => {}
    }
}

/// A rule keeps the slot of its name; a new name takes a slot that no rule in force uses.
fn assign_slots(have: &Image, want: &Ruleset) -> Result<Vec<u16>, PlanError> {
    let by_name: BTreeMap<&str, u16> = have.names.iter().map(|(slot, name)| (name.as_str(), *slot)).collect();
    let taken: BTreeSet<u16> = have.names.keys().copied().collect();
    let mut free = (0..RULE_SLOTS as u16).filter(|slot| !taken.contains(slot));
    want.rules
        .iter()
        .map(|rule| by_name.get(rule.name.as_str()).copied().or_else(|| free.next()))
        .collect::<Option<Vec<u16>>>()
        .ok_or(PlanError::NoSlots(want.rules.len()))
}

/// A ruleset as the entries of one generation.
fn encode(want: &Ruleset, slots: &[u16], generation: u8) -> Entries {
    let slot = |rule: usize| slots.get(rule).copied().unwrap_or(guard_common::abi::NO_RULE);
    let mut entries = Entries::default();
    for (prefix, scope) in &want.tables.scopes {
        let (address, bits) = mapped_prefix(prefix);
        let key = ScopeKey { generation: [generation, 0, 0, 0], address };
        entries.scopes.insert((32 + bits, key), ScopeValue { scope: *scope });
    }
    for (guarded, rule) in &want.tables.ports {
        let key = PortKey { scope: guarded.scope, port: guarded.port, protocol: guarded.protocol, generation };
        entries.ports.insert(key, port_value(rule, slot));
    }
    for ((list, prefix), Peer { rule, kind }) in &want.tables.peers {
        let value = PeerValue {
            rule: slot(*rule),
            kind: match kind {
                PeerKind::Allow => PeerValue::ALLOW,
                PeerKind::Except => PeerValue::EXCEPT,
            },
        };
        let list = list_bytes(generation, *list);
        let bits = 32 + u32::from(prefix.prefix_len());
        match prefix {
            IpNet::V4(net) => {
                entries.peers_v4.insert((bits, PeerKey4 { list, address: net.network().octets() }), value);
            }
            IpNet::V6(net) => {
                entries.peers_v6.insert((bits, PeerKey6 { list, address: net.network().octets() }), value);
            }
        }
    }
    entries
}

fn port_value(rule: &PortRule, slot: impl Fn(usize) -> u16) -> PortValue {
    let none = guard_common::abi::NO_RULE;
    let mut flags = 0;
    flags |= if rule.tunnel.is_some() { PortValue::ALLOW_TUNNEL } else { 0 };
    flags |= if rule.node.is_some() { PortValue::ALLOW_NODE } else { 0 };
    flags |= if rule.audit { PortValue::AUDIT } else { 0 };
    PortValue {
        list: rule.list,
        rule: slot(rule.rule),
        tunnel_rule: rule.tunnel.map_or(none, &slot),
        node_rule: rule.node.map_or(none, &slot),
        flags,
    }
}

/// A prefix in the 16-byte form, with its length in that form.
fn mapped_prefix(prefix: &IpNet) -> ([u8; 16], u32) {
    match prefix {
        IpNet::V4(net) => (guard_common::packet::mapped(net.network().octets()), 96 + u32::from(net.prefix_len())),
        IpNet::V6(net) => (net.network().octets(), u32::from(net.prefix_len())),
    }
}

/// The operations that make the entries of one generation in `have` equal to `target`.
fn bring(ops: &mut Vec<Op>, have: &Entries, target: &Entries, generation: u8) {
    let peer_generation = |list: &[u8; 4]| list[0] >> 7;
    difference(ops, &have.scopes, &target.scopes, |(_, key)| key.generation[0] == generation, Op::Scope);
    difference(ops, &have.ports, &target.ports, |key| key.generation == generation, Op::Port);
    difference(ops, &have.peers_v4, &target.peers_v4, |(_, key)| peer_generation(&key.list) == generation, Op::PeerV4);
    difference(ops, &have.peers_v6, &target.peers_v6, |(_, key)| peer_generation(&key.list) == generation, Op::PeerV6);
}

fn difference<K: Ord + Copy, V: Copy + PartialEq>(
    ops: &mut Vec<Op>,
    have: &BTreeMap<K, V>,
    target: &BTreeMap<K, V>,
    of_generation: impl Fn(&K) -> bool,
    op: impl Fn(K, Option<V>) -> Op,
) {
    // Removals first: the table may be full of a generation that was never finished.
    for key in have.keys().filter(|key| of_generation(key) && !target.contains_key(key)) {
        ops.push(op(*key, None));
    }
    for (key, value) in target {
        if have.get(key) != Some(value) {
            ops.push(op(*key, Some(*value)));
        }
    }
}
