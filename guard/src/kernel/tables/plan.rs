//! Owns the step from the content of the maps and the wanted ruleset to map operations: a pure function.
//! Called by `apply` at start and on every edit: both take the same path.
//! Must never touch an entry of the generation in force before the next generation is active.

use std::collections::{BTreeMap, BTreeSet};

use guard_common::abi::{
    Active, CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey, DestinationValue, Generation,
    MAX_NAMESPACES, MAX_PORT_WORDS, NamespaceKey, NamespaceValue, PeerKey4, PeerKey6, PeerValue, PortKey, PortValue,
    RULE_SLOTS, ScopeKey, ScopeValue, list_bytes, port_word,
};
use guard_policy::{
    ruleset::{Peer, PeerKind, PortRule, Ruleset},
    tables::{
        image::{Entries, Followed, Image},
        pod_scopes::Observed,
    },
};
use ipnet::IpNet;

/// One operation on the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Assigns a rule slot to a rule and sets its counters to zero.
    Name(u16, String),
    /// Frees a rule slot.
    Unname(u16),
    /// Writes the entry of a scope, or removes it (`None`).
    Scope((u32, ScopeKey), Option<ScopeValue>),
    /// The same for a port.
    Port(PortKey, Option<PortValue>),
    /// The same for the copy of a scope's entry.
    ScopeCopy((u32, ScopeKey), Option<ScopeValue>),
    /// The same for the copy of a port's entry.
    PortCopy(PortKey, Option<PortValue>),
    /// Writes a word of the bit map of port numbers; `None` is zero.
    PortNumbers(u32, Option<u64>),
    /// The same for an IPv4 peer.
    PeerV4((u32, PeerKey4), Option<PeerValue>),
    /// The same for an IPv6 peer.
    PeerV6((u32, PeerKey6), Option<PeerValue>),
    /// The same for a destination.
    Destination((u32, DestinationKey), Option<DestinationValue>),
    /// The same for an admitted cgroup.
    Caller(CallerKey, Option<CallerValue>),
    /// The same for a named cgroup.
    Cgroup(CgroupKey, Option<CgroupValue>),
    /// The same for a network namespace.
    Namespace(NamespaceKey, Option<NamespaceValue>),
    /// Writes the header of a generation; `None` marks the generation as incomplete.
    Generation(u8, Option<Generation>),
    /// The single store that puts the new generation into force.
    Activate(u32),
    /// Waits until no running program uses the old generation.
    Grace,
}

/// The operations of a change, and the state after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The operations, in order.
    pub ops: Vec<MapOp>,
    /// The epoch in force after the last operation.
    pub epoch: u32,
    /// The rule slot of each rule, in the order of the ruleset.
    pub slots: Vec<u16>,
}

/// Why a change cannot be planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The ruleset needs more rule slots than are free.
    #[error(
        "not enough free rule slots: the policy has {0} rules, and the rules in force keep theirs until the switch ({RULE_SLOTS} in all)"
    )]
    NoSlots(usize),
}

/// Plans the change from `have` to `want` on a node with these cgroups and network namespaces. The plan is empty if `have` already is what is
/// wanted. If only cgroups or namespaces came or went, it changes entries of the generation in force.
pub fn plan(have: &Image, want: &Ruleset, observed: &Observed) -> Result<Plan, PlanError> {
    let slots = assign_slots(have, want)?;
    // Someone else may have written another epoch into the active slot than the one that the programs use.
    let read = have.in_force();
    let (in_force, generation) = (read.epoch, read.key_generation());
    let names: BTreeMap<u16, String> =
        slots.iter().zip(&want.rules).map(|(slot, rule)| (*slot, rule.name.clone())).collect();

    let mut ops = Vec::new();
    if read.generation.is_some() && have.names == names && holds_peers(&have.entries, want, &slots, generation) {
        let mut current = encode(want, &slots, in_force, observed);
        let followed = std::mem::replace(&mut current.followed, have.entries.followed.clone());
        if have.entries == current {
            follow(&mut ops, &have.entries.followed, &followed, generation);
            follow(&mut ops, &have.entries.followed, &Followed::default(), generation ^ 1);
            if have.epoch != in_force {
                ops.push(MapOp::Activate(in_force));
            }
            return Ok(Plan { ops, epoch: in_force, slots });
        }
    }
    // Epoch 0 means "none": a wrap skips it and still changes the generation, which is the parity of the epoch.
    let epoch = if in_force >= u32::MAX - 1 { (in_force & 1) ^ 3 } else { in_force + 1 };
    let new = Active { epoch }.generation();
    let target = encode(want, &slots, epoch, observed);

    for (slot, name) in &names {
        if have.names.get(slot) != Some(name) {
            ops.push(MapOp::Name(*slot, name.clone()));
        }
    }
    bring(&mut ops, &have.entries, &target, new);
    ops.push(MapOp::Activate(epoch));
    ops.push(MapOp::Grace);
    bring(&mut ops, &have.entries, &Entries::default(), generation);
    for slot in have.names.keys().filter(|slot| !names.contains_key(slot)) {
        ops.push(MapOp::Unname(*slot));
    }
    Ok(Plan { ops, epoch, slots })
}

impl MapOp {
    /// Does to an image what the write does to the maps. The tests and `apply` share it.
    pub fn apply_to(&self, image: &mut Image) {
        fn set<K: Ord + Copy, V: Copy>(table: &mut BTreeMap<K, V>, key: &K, value: Option<V>) {
            match value {
                Some(value) => table.insert(*key, value),
                None => table.remove(key),
            };
        }
        match self {
            MapOp::Name(slot, name) => {
                image.names.insert(*slot, name.clone());
            }
            MapOp::Unname(slot) => {
                image.names.remove(slot);
            }
            MapOp::Scope(key, value) => set(&mut image.entries.scopes, key, *value),
            MapOp::Port(key, value) => set(&mut image.entries.ports, key, *value),
            MapOp::ScopeCopy(key, value) => set(&mut image.entries.scopes_copy, key, *value),
            MapOp::PortCopy(key, value) => set(&mut image.entries.ports_copy, key, *value),
            MapOp::PortNumbers(index, value) => set(&mut image.entries.port_numbers, index, *value),
            MapOp::PeerV4(key, value) => set(&mut image.entries.peers_v4, key, *value),
            MapOp::PeerV6(key, value) => set(&mut image.entries.peers_v6, key, *value),
            MapOp::Destination(key, value) => set(&mut image.entries.destinations, key, *value),
            MapOp::Caller(key, value) => set(&mut image.entries.followed.callers, key, *value),
            MapOp::Cgroup(key, value) => set(&mut image.entries.followed.cgroups, key, *value),
            MapOp::Namespace(key, value) => set(&mut image.entries.followed.namespaces, key, *value),
            MapOp::Generation(key, value) => set(&mut image.entries.followed.generations, key, *value),
            MapOp::Activate(epoch) => image.epoch = *epoch,
            MapOp::Grace => {}
        }
    }
}

/// A rule keeps the slot of its name. A new name gets a slot that no rule in force uses.
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

/// Encodes a ruleset as the entries of an epoch's generation.
fn encode(want: &Ruleset, slots: &[u16], epoch: u32, observed: &Observed) -> Entries {
    let generation = Active { epoch }.generation();
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
        let (word, bit) = port_word(generation, guarded.port);
        *entries.port_numbers.entry(word).or_default() |= bit;
    }
    entries.scopes_copy = entries.scopes.clone();
    entries.ports_copy = entries.ports.clone();
    // Collected first and sorted once, because there may be a hundred thousand entries.
    let (mut peers_v4, mut peers_v6) = (Vec::new(), Vec::new());
    for ((list, prefix), peer) in &want.tables.peers {
        match peer_entry(*list, prefix, peer, slot, generation) {
            PeerEntry::V4(key, value) => peers_v4.push((key, value)),
            PeerEntry::V6(key, value) => peers_v6.push((key, value)),
        }
    }
    entries.peers_v4 = peers_v4.into_iter().collect();
    entries.peers_v6 = peers_v6.into_iter().collect();
    for port in &want.tables.destination_ports {
        let scope = ScopeValue::DESTINATIONS | port.set;
        let key = PortKey { scope, port: port.port, protocol: port.protocol, generation };
        entries.ports.insert(key, PortValue::default());
    }
    for ((list, prefix), set) in &want.tables.destinations {
        let (address, bits) = mapped_prefix(prefix);
        let key = DestinationKey { list: list_bytes(generation, *list), address };
        entries.destinations.insert((32 + bits, key), DestinationValue { set: *set });
    }
    entries.followed = encode_followed(want, slot, epoch, observed);
    entries
}

/// An entry of one of the peer tables.
enum PeerEntry {
    V4((u32, PeerKey4), PeerValue),
    V6((u32, PeerKey6), PeerValue),
}

fn peer_entry(list: u32, prefix: &IpNet, peer: &Peer, slot: impl Fn(usize) -> u16, generation: u8) -> PeerEntry {
    let value = PeerValue {
        rule: slot(peer.rule),
        kind: match peer.kind {
            PeerKind::Allow => PeerValue::ALLOW,
            PeerKind::Except => PeerValue::EXCEPT,
        },
    };
    let list = list_bytes(generation, list);
    let bits = 32 + u32::from(prefix.prefix_len());
    match prefix {
        IpNet::V4(net) => PeerEntry::V4((bits, PeerKey4 { list, address: net.network().octets() }), value),
        IpNet::V6(net) => PeerEntry::V6((bits, PeerKey6 { list, address: net.network().octets() }), value),
    }
}

/// Whether every wanted peer exists. This cheap check comes before the full comparison, because it ends early after an edit of a long list.
fn holds_peers(have: &Entries, want: &Ruleset, slots: &[u16], generation: u8) -> bool {
    let slot = |rule: usize| slots.get(rule).copied().unwrap_or(guard_common::abi::NO_RULE);
    want.tables.peers.iter().all(|((list, prefix), peer)| match peer_entry(*list, prefix, peer, slot, generation) {
        PeerEntry::V4(key, value) => have.peers_v4.get(&key) == Some(&value),
        PeerEntry::V6(key, value) => have.peers_v6.get(&key) == Some(&value),
    })
}

/// Encodes the part of a ruleset that depends on cgroups and network namespaces.
fn encode_followed(want: &Ruleset, slot: impl Fn(usize) -> u16, epoch: u32, observed: &Observed) -> Followed {
    let generation = Active { epoch }.generation();
    let Observed { cgroups, namespaces } = observed;
    let tables = &want.tables;
    let mut followed = Followed::default();
    for ((list, path), rule) in &tables.callers {
        let Some(cgroup) = cgroups.id(path) else { continue };
        let key = CallerKey { cgroup, list: list_bytes(generation, *list), reserved: 0 };
        followed.callers.insert(key, CallerValue { rule: u32::from(slot(*rule)) });
    }
    for (path, roles) in &tables.cgroups {
        let Some(cgroup) = cgroups.id(path) else { continue };
        let key = CgroupKey { cgroup, generation: u64::from(generation) };
        followed.cgroups.insert(key, CgroupValue { roles: *roles });
    }
    // A namespace that does not fit is judged by the address of each packet.
    for (netns, scope) in namespaces.scopes(tables).take(MAX_NAMESPACES as usize / 2) {
        let key = NamespaceKey { netns, generation: u64::from(generation) };
        followed.namespaces.insert(key, NamespaceValue { scope });
    }
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    let has_hub = tables.destinations.keys().any(|(list, _)| *list == DestinationKey::CONTROL_PLANE);
    let features = flag(tables.has_udp, Generation::UDP)
        | flag(tables.pods_cgroup.is_some(), Generation::PODS)
        | flag(!tables.cgroups.is_empty(), Generation::CGROUPS)
        | flag(has_hub, Generation::CONTROL_PLANE)
        | flag(tables.audit, Generation::AUDIT);
    let pods_cgroup = tables.pods_cgroup.as_ref().and_then(|pods| cgroups.pods(pods)).unwrap_or(0);
    followed.generations.insert(generation, Generation { pods_cgroup, features, epoch, ..Generation::default() });
    followed
}

fn port_value(rule: &PortRule, slot: impl Fn(usize) -> u16) -> PortValue {
    let none = guard_common::abi::NO_RULE;
    let mut flags = 0;
    flags |= if rule.tunnel.is_some() { PortValue::ALLOW_TUNNEL } else { 0 };
    flags |= if rule.node.is_some() { PortValue::ALLOW_NODE } else { 0 };
    flags |= if rule.caller { PortValue::ALLOW_CALLER } else { 0 };
    flags |= if rule.audit { PortValue::AUDIT } else { 0 };
    let opens = [
        (rule.opens.tunnel, PortValue::ALLOW_TUNNEL),
        (rule.opens.node, PortValue::ALLOW_NODE),
        (rule.opens.caller, PortValue::ALLOW_CALLER),
    ];
    for (_, flag) in opens.into_iter().filter(|(opens, _)| *opens) {
        flags |= flag << PortValue::OPENS_SHIFT;
    }
    PortValue {
        list: rule.list,
        rule: slot(rule.rule),
        tunnel_rule: rule.tunnel.map_or(none, &slot),
        node_rule: rule.node.map_or(none, &slot),
        flags,
    }
}

/// A prefix in the 16-byte form of an address, with the length in that form.
fn mapped_prefix(prefix: &IpNet) -> ([u8; 16], u32) {
    match prefix {
        IpNet::V4(net) => (guard_common::packet::mapped(net.network().octets()), 96 + u32::from(net.prefix_len())),
        IpNet::V6(net) => (net.network().octets(), u32::from(net.prefix_len())),
    }
}

/// The operations that make the entries of one generation in `have` equal to `target`. The generation is incomplete until the last of them.
fn bring(ops: &mut Vec<MapOp>, have: &Entries, target: &Entries, generation: u8) {
    let mut followed = have.followed.clone();
    if followed.generations.remove(&generation).is_some() {
        ops.push(MapOp::Generation(generation, None));
    }
    let peer_generation = |list: &[u8; 4]| list[0] >> 7;
    difference(ops, &have.scopes, &target.scopes, |(_, key)| key.generation[0] == generation, MapOp::Scope);
    difference(ops, &have.ports, &target.ports, |key| key.generation == generation, MapOp::Port);
    let of_scope = |(_, key): &(u32, ScopeKey)| key.generation[0] == generation;
    difference(ops, &have.scopes_copy, &target.scopes_copy, of_scope, MapOp::ScopeCopy);
    difference(ops, &have.ports_copy, &target.ports_copy, |key| key.generation == generation, MapOp::PortCopy);
    let of_word = |index: &u32| (index / (MAX_PORT_WORDS / 2)) as u8 == generation;
    difference(ops, &have.port_numbers, &target.port_numbers, of_word, MapOp::PortNumbers);
    difference(
        ops,
        &have.peers_v4,
        &target.peers_v4,
        |(_, key)| peer_generation(&key.list) == generation,
        MapOp::PeerV4,
    );
    difference(
        ops,
        &have.peers_v6,
        &target.peers_v6,
        |(_, key)| peer_generation(&key.list) == generation,
        MapOp::PeerV6,
    );
    let of_generation = |(_, key): &(u32, DestinationKey)| peer_generation(&key.list) == generation;
    difference(ops, &have.destinations, &target.destinations, of_generation, MapOp::Destination);
    follow(ops, &followed, &target.followed, generation);
}

/// The same for the entries that follow cgroups and network namespaces. Their order does not matter: a cgroup is admitted only if it is also named.
fn follow(ops: &mut Vec<MapOp>, have: &Followed, target: &Followed, generation: u8) {
    difference(ops, &have.callers, &target.callers, |key| key.list[0] >> 7 == generation, MapOp::Caller);
    difference(ops, &have.cgroups, &target.cgroups, |key| key.generation == u64::from(generation), MapOp::Cgroup);
    let of_namespace = |key: &NamespaceKey| key.generation == u64::from(generation);
    difference(ops, &have.namespaces, &target.namespaces, of_namespace, MapOp::Namespace);
    difference(ops, &have.generations, &target.generations, |key| *key == generation, MapOp::Generation);
}

fn difference<K: Ord + Copy, V: Copy + PartialEq>(
    ops: &mut Vec<MapOp>,
    have: &BTreeMap<K, V>,
    target: &BTreeMap<K, V>,
    of_generation: impl Fn(&K) -> bool,
    op: impl Fn(K, Option<V>) -> MapOp,
) {
    // Removals first: the table may be full of entries of a generation that was never finished.
    for key in have.keys().filter(|key| of_generation(key) && !target.contains_key(key)) {
        ops.push(op(*key, None));
    }
    for (key, value) in target {
        if have.get(key) != Some(value) {
            ops.push(op(*key, Some(*value)));
        }
    }
}

#[cfg(test)]
mod tests {
    use guard_policy::{
        ruleset::{DestinationPort, GuardedPort, Mode, PodsCgroup, RuleSummary, RulesetTables, Selectors},
        tables::{cgroups::Cgroups, pod_scopes::Namespaces},
    };
    use proptest::prelude::*;

    use super::*;

    fn ruleset() -> impl Strategy<Value = Ruleset> {
        let names = prop::collection::btree_set("[a-e]", 1..4);
        let nets =
            prop::sample::select(vec!["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "fd00::/16", "::/0", "10.1.2.3/32"]);
        let nets = nets.prop_map(|text: &str| text.parse::<IpNet>().unwrap());
        let scopes = prop::collection::btree_map(nets.clone(), 0u32..3, 0..4);
        let ports = prop::collection::btree_map(
            (0u32..3, 0u16..4),
            (0u32..3, 0usize..4, prop::option::of(0usize..4), any::<bool>()),
            0..6,
        );
        let peers = prop::collection::btree_map((0u32..3, nets), (0usize..4, any::<bool>()), 0..6);
        let path = || prop::sample::select(vec!["/here", "/here/too", "/gone"]).prop_map(str::to_owned);
        let callers = prop::collection::btree_map((0u32..3, path()), 0usize..4, 0..4);
        let others = (callers, prop::collection::btree_map(path(), 1u32..4, 0..3), any::<bool>(), 0u32..3);
        (names, scopes, ports, peers, others).prop_map(|(names, scopes, ports, peers, others)| {
            let (callers, cgroups, all_pods, set) = others;
            let rules: Vec<RuleSummary> = names
                .into_iter()
                .map(|name| RuleSummary { name, mode: Mode::Enforce, guards: String::new(), allows: String::new() })
                .collect();
            let rule = |index: usize| index % rules.len();
            let tables = RulesetTables {
                scopes,
                ports: ports
                    .into_iter()
                    .map(|((scope, port), (list, by, node, audit))| {
                        let value = PortRule {
                            list,
                            rule: rule(by),
                            tunnel: None,
                            node: node.map(rule),
                            caller: audit,
                            audit,
                            opens: Selectors { node: audit, ..Selectors::default() },
                        };
                        (GuardedPort { scope, protocol: 6, port }, value)
                    })
                    .collect(),
                peers: peers
                    .into_iter()
                    .map(|(key, (by, allow))| {
                        let kind = if allow { PeerKind::Allow } else { PeerKind::Except };
                        (key, Peer { rule: rule(by), kind })
                    })
                    .collect(),
                callers: callers.into_iter().map(|(key, by)| (key, rule(by))).collect(),
                cgroups,
                pods_cgroup: all_pods.then(|| PodsCgroup::Named("/here".to_owned())),
                destinations: [((0, "10.9.0.0/24".parse().unwrap()), set)].into(),
                destination_ports: [DestinationPort { set, protocol: 6, port: 1 }].into(),
                has_udp: all_pods,
                all_pods,
                audit: false,
                edge: BTreeSet::new(),
            };
            let (name, digest, dial) = (String::new(), String::new(), Vec::new());
            let services = Default::default();
            Ruleset { name, digest, mode: Mode::Enforce, rules, tables, dial, services }
        })
    }

    fn observed() -> Observed {
        let at = |text: &str| text.parse().unwrap();
        let addresses = [(21, [at("10.1.0.9")].into()), (22, [at("192.0.2.1")].into()), (23, [at("fd00::9")].into())];
        Observed {
            cgroups: [("/here".to_owned(), 7), ("/here/too".to_owned(), 8)].into_iter().collect(),
            namespaces: addresses.into_iter().collect(),
        }
    }

    /// The part of an image that a packet can meet: the entries of the generation in force, or nothing if no generation is complete.
    fn view(image: &Image) -> Entries {
        let Some(generation) = image.in_force().generation else { return Entries::default() };
        let mut entries = image.entries.clone();
        entries.scopes.retain(|(_, key), _| key.generation[0] == generation);
        entries.ports.retain(|key, _| key.generation == generation);
        entries.scopes_copy.retain(|(_, key), _| key.generation[0] == generation);
        entries.ports_copy.retain(|key, _| key.generation == generation);
        entries.port_numbers.retain(|index, _| (*index >> 10) as u8 == generation);
        entries.peers_v4.retain(|(_, key), _| key.list[0] >> 7 == generation);
        entries.peers_v6.retain(|(_, key), _| key.list[0] >> 7 == generation);
        entries.destinations.retain(|(_, key), _| key.list[0] >> 7 == generation);
        entries.followed.callers.retain(|key, _| key.list[0] >> 7 == generation);
        entries.followed.cgroups.retain(|key, _| key.generation == u64::from(generation));
        entries.followed.namespaces.retain(|key, _| key.generation == u64::from(generation));
        entries.followed.generations.retain(|key, _| *key == generation);
        entries
    }

    fn run(image: &mut Image, ops: &[MapOp]) {
        ops.iter().for_each(|op| op.apply_to(image));
    }

    proptest! {
        #[test]
        fn a_plan_carried_out_leaves_exactly_what_was_wanted(rulesets in prop::collection::vec(ruleset(), 1..5)) {
            let mut image = Image::default();
            for want in &rulesets {
                let plan = plan(&image, want, &observed()).unwrap();
                run(&mut image, &plan.ops);
                prop_assert_eq!(image.epoch, plan.epoch);
                prop_assert_eq!(&image.entries, &encode(want, &plan.slots, plan.epoch, &observed()));
                prop_assert_eq!(image.names.len(), want.rules.len());
                // What is in force is not written again: no second epoch for the same ruleset.
                prop_assert!(super::plan(&image, want, &observed()).unwrap().ops.is_empty());
            }
        }

        #[test]
        fn a_packet_meets_the_old_ruleset_or_the_new_one(first in ruleset(), second in ruleset(), third in ruleset(), crash in 0usize..40) {
            let mut image = Image::default();
            let plan_of_first = plan(&image, &first, &observed()).unwrap();
            run(&mut image, &plan_of_first.ops);
            // A crash in the middle of an apply: the next apply starts from what the maps hold.
            let half = plan(&image, &second, &observed()).unwrap().ops;
            let before = view(&image);
            let cut = crash.min(half.len());
            run(&mut image, &half[..cut]);
            if !half[..cut].iter().any(|op| matches!(op, MapOp::Activate(_))) {
                prop_assert_eq!(&view(&image), &before);
            }
            let plan = plan(&image, &third, &observed()).unwrap();
            let old = view(&image);
            let new = encode(&third, &plan.slots, plan.epoch, &observed());
            for op in &plan.ops {
                op.apply_to(&mut image);
                let now = view(&image);
                prop_assert!(now == old || now == new, "a mix after {:?}", op);
            }
            prop_assert_eq!(&image.entries, &new);
        }

        #[test]
        fn what_somebody_else_wrote_is_mended_and_meanwhile_no_half_is_met(want in ruleset(), before in ruleset(), active in 0u32..9, deeds in prop::collection::vec((0usize..6, any::<prop::sample::Index>()), 0..5)) {
            let mut image = Image::default();
            for ruleset in [&before, &want] {
                let plan = plan(&image, ruleset, &observed()).unwrap();
                run(&mut image, &plan.ops);
            }
            image.epoch = active;
            for (table, which) in deeds {
                let entries = &mut image.entries;
                fn take<K: Ord + Copy, V>(table: &mut BTreeMap<K, V>, which: prop::sample::Index) {
                    if let Some(key) = (!table.is_empty()).then(|| *which.get(&table.keys().collect::<Vec<_>>()[..])).copied() {
                        table.remove(&key);
                    }
                }
                match table {
                    0 => take(&mut entries.ports, which),
                    1 => take(&mut entries.scopes, which),
                    2 => take(&mut entries.peers_v4, which),
                    3 => take(&mut entries.ports_copy, which),
                    4 => take(&mut entries.port_numbers, which),
                    _ => take(&mut entries.followed.generations, which),
                }
            }
            let plan = plan(&image, &want, &observed()).unwrap();
            let (old, new) = (view(&image), encode(&want, &plan.slots, plan.epoch, &observed()));
            for op in &plan.ops {
                op.apply_to(&mut image);
                let now = view(&image);
                prop_assert!(now == old || now == new || image.in_force().generation.is_none(), "a mix after {:?}", op);
            }
            prop_assert_eq!((image.in_force().epoch, image.in_force().generation), (plan.epoch, Some((plan.epoch & 1) as u8)));
            prop_assert_eq!(image.epoch, plan.epoch);
            prop_assert_eq!(&image.entries, &new);
        }

        #[test]
        fn cgroups_and_namespaces_that_come_and_go_are_followed_without_a_new_epoch(
            want in ruleset(),
            ids in prop::collection::btree_map("/here(/too)?|/gone", 1u64..5, 0..3),
            addresses in prop::collection::btree_map(20u64..24, prop::collection::btree_set(prop::sample::select(vec!["10.1.0.9", "fd00::9", "10.2.0.1"]), 0..3), 0..4),
        ) {
            let mut image = Image::default();
            let first = plan(&image, &want, &observed()).unwrap();
            run(&mut image, &first.ops);
            let parsed = |addresses: BTreeSet<&str>| addresses.into_iter().map(|address| address.parse().unwrap()).collect();
            let namespaces: Namespaces = addresses.into_iter().map(|(cookie, addresses)| (cookie, parsed(addresses))).collect();
            let now = Observed { cgroups: ids.into_iter().collect::<Cgroups>(), namespaces };
            let followed = plan(&image, &want, &now).unwrap();
            prop_assert_eq!(followed.epoch, first.epoch);
            run(&mut image, &followed.ops);
            prop_assert_eq!(&image.entries, &encode(&want, &first.slots, first.epoch, &now));
        }

        #[test]
        fn a_rule_keeps_its_slot_and_shares_it_with_nobody_in_force(first in ruleset(), second in ruleset()) {
            let mut image = Image::default();
            let plan_of_first = plan(&image, &first, &observed()).unwrap();
            run(&mut image, &plan_of_first.ops);
            let before = image.names.clone();
            let plan = plan(&image, &second, &observed()).unwrap();
            for (rule, slot) in second.rules.iter().zip(&plan.slots) {
                match before.iter().find(|(_, name)| **name == rule.name) {
                    Some((kept, _)) => prop_assert_eq!(kept, slot),
                    None => prop_assert!(!before.contains_key(slot)),
                }
            }
        }
    }

    #[test]
    fn the_epoch_never_becomes_none() {
        for epoch in [u32::MAX, u32::MAX - 1] {
            let image = Image { epoch, ..Image::default() };
            let want = Ruleset {
                name: String::new(),
                digest: String::new(),
                mode: Mode::Enforce,
                rules: vec![RuleSummary {
                    name: "new".into(),
                    mode: Mode::Enforce,
                    guards: String::new(),
                    allows: String::new(),
                }],
                tables: RulesetTables::default(),
                services: Default::default(),
                dial: Vec::new(),
            };
            let next = plan(&image, &want, &observed()).unwrap().epoch;
            assert!(next != 0 && next & 1 != epoch & 1);
        }
    }
}
