//! Owns the step from rules to the kernel's tables: each port of each scope, with everyone whom its rules allow.
//! Called by `compile`, with rules that have no errors.
//! Must never let one rule take away what another rule allows.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use guard_common::{abi::CgroupValue, packet::UDP};
use ipnet::IpNet;

use crate::{
    node_facts::NodeFacts,
    parse::checked::{CheckedDocument, GuardRule, PeerBlock},
    ruleset::{
        ALL_PODS_SCOPE, GuardedPort, Mode, NODE_SCOPE, OTHER_PODS_SCOPE, PodsCgroup, PortRule, RulesetTables,
        ScopeNumber, Selectors,
    },
    tables::{
        destinations::destinations,
        peers::{common, peers},
    },
};

/// The indices of rules that guard a port together: one of them has to admit.
type Guarding = Vec<usize>;
/// The peer lists by what has to admit: one rule of each group.
type Lists = BTreeMap<Vec<Guarding>, u32>;

/// Builds the kernel's tables.
pub(crate) fn tables(document: &CheckedDocument<'_>, node: &NodeFacts) -> RulesetTables {
    let rules = document.rules;
    let mut tables = RulesetTables { audit: document.audit, edge: document.edge.clone(), ..RulesetTables::default() };
    let mut lists = Lists::new();
    let all: Vec<usize> = (0..rules.len()).collect();
    let of = |index: &usize| rules.get(*index);
    add_scope(&mut tables, &mut lists, rules, NODE_SCOPE, std::slice::from_ref(&all), |rule| &rule.node);

    // Rules without prefixes guard the ports of every pod, including pods whose address lies in a prefix of another rule.
    let every: Vec<usize> = all.iter().copied().filter(|index| of(index).is_some_and(GuardRule::all_pods)).collect();
    tables.all_pods = !every.is_empty();
    if rules.iter().any(|rule| !rule.pods.is_empty()) {
        let named = every.first().and_then(of).and_then(|rule| rule.pods_cgroup.clone());
        tables.pods_cgroup = Some(named.map_or(PodsCgroup::Usual, PodsCgroup::Named));
    }
    add_scope(&mut tables, &mut lists, rules, ALL_PODS_SCOPE, std::slice::from_ref(&every), |rule| &rule.pods);
    // Only the longest matching prefix of a pod's address is looked up, so it carries the rules of every prefix that contains it.
    let mut scopes: BTreeMap<Vec<usize>, u32> = BTreeMap::new();
    for cidr in rules.iter().flat_map(|rule| &rule.cidrs).copied().collect::<BTreeSet<IpNet>>() {
        let around = |rule: &GuardRule| rule.all_pods() || rule.cidrs.iter().any(|outer| outer.contains(&cidr));
        let of_scope: Vec<usize> = all.iter().copied().filter(|index| of(index).is_some_and(around)).collect();
        let next = NODE_SCOPE + 1 + scopes.len() as u32;
        let scope = *scopes.entry(of_scope).or_insert(next);
        tables.scopes.insert(cidr, scope);
    }
    for (of_scope, scope) in &scopes {
        add_scope(&mut tables, &mut lists, rules, *scope, std::slice::from_ref(of_scope), |rule| &rule.pods);
    }
    // A pod that cannot be told may be any of these.
    let any: Vec<Vec<usize>> = scopes.into_keys().chain([every]).collect();
    add_scope(&mut tables, &mut lists, rules, OTHER_PODS_SCOPE, &any, |rule| &rule.pods);
    for address in &node.addresses {
        tables.scopes.insert(IpNet::from(*address), NODE_SCOPE);
    }
    for (groups, list) in &lists {
        let of_group = |guarding: &Guarding| {
            let blocks: Vec<PeerBlock> =
                guarding.iter().filter_map(of).flat_map(|rule| rule.blocks.iter().cloned()).collect();
            peers(&blocks)
        };
        let admitted = groups.iter().map(of_group).reduce(|one, other| common(&one, &other)).unwrap_or_default();
        tables.peers.extend(admitted.into_iter().map(|(net, peer)| ((*list, net), peer)));
    }
    add_cgroups(&mut tables, &lists, document);
    destinations(&mut tables, document, node);
    tables
}

/// Adds the guarded ports of a scope. It stands for one or more sets of listeners, each with the rules that guard it: of every set with a
/// rule for a port, one rule has to admit.
fn add_scope(
    tables: &mut RulesetTables,
    lists: &mut Lists,
    rules: &[GuardRule],
    scope: ScopeNumber,
    sets: &[Vec<usize>],
    ports: fn(&GuardRule) -> &[RangeInclusive<u16>],
) {
    let mut by_port: BTreeMap<(u8, u16), Vec<Guarding>> = BTreeMap::new();
    for of_set in sets {
        let mut of_ports: BTreeMap<(u8, u16), Guarding> = BTreeMap::new();
        for (index, rule) in of_set.iter().filter_map(|index| rules.get(*index).map(|rule| (*index, rule))) {
            for port in ports(rule).iter().cloned().flatten() {
                let guarding = of_ports.entry((rule.protocol, port)).or_default();
                if guarding.last() != Some(&index) {
                    guarding.push(index);
                }
            }
        }
        for (port, guarding) in of_ports {
            let groups = by_port.entry(port).or_default();
            if !groups.contains(&guarding) {
                groups.push(guarding);
            }
        }
    }
    for ((protocol, port), groups) in by_port {
        let any =
            |allows: fn(&GuardRule) -> bool| groups.iter().flatten().any(|index| rules.get(*index).is_some_and(allows));
        let opens = Selectors {
            tunnel: any(|rule| rule.tunnel),
            node: any(|rule| rule.from_node),
            caller: any(|rule| !rule.callers.is_empty()),
        };
        // A set whose rules only audit denies nobody, unless there is no other.
        let enforces = |guarding: &Guarding| {
            guarding.iter().any(|index| rules.get(*index).is_some_and(|rule| rule.mode == Mode::Enforce))
        };
        let audit = !groups.iter().any(enforces);
        let groups: Vec<Guarding> = groups.iter().filter(|group| audit || enforces(group)).cloned().collect();
        // The first rule of the first set, if each set has one.
        let first = |allows: fn(&GuardRule) -> bool| {
            let of_group =
                |guarding: &Guarding| guarding.iter().copied().find(|index| rules.get(*index).is_some_and(allows));
            let found: Option<Vec<usize>> = groups.iter().map(of_group).collect();
            found?.first().copied()
        };
        let number = lists.len() as u32;
        let rule = PortRule {
            list: *lists.entry(groups.clone()).or_insert(number),
            rule: groups.first().and_then(|group| group.first()).copied().unwrap_or_default(),
            tunnel: first(|rule| rule.tunnel),
            node: first(|rule| rule.from_node),
            caller: first(|rule| !rule.callers.is_empty()).is_some(),
            audit,
            opens: if scope == OTHER_PODS_SCOPE { opens } else { Selectors::default() },
        };
        tables.ports.insert(GuardedPort { scope, protocol, port }, rule);
        tables.has_udp |= protocol == UDP;
    }
}

/// Adds the named cgroups and the lists that admit them. A process is identified by the innermost named cgroup that contains it, so that
/// cgroup carries what is allowed to each outer one.
fn add_cgroups(tables: &mut RulesetTables, lists: &Lists, document: &CheckedDocument<'_>) {
    for cgroup in document.rules.iter().flat_map(|rule| &rule.callers) {
        *tables.cgroups.entry(cgroup.clone()).or_default() |= CgroupValue::CALLER;
    }
    if let Some(companion) = &document.companion {
        *tables.cgroups.entry(companion.cgroup.clone()).or_default() |= CgroupValue::COMPANION;
    }
    for (groups, list) in lists {
        for inner in tables.cgroups.keys() {
            // The first rule of a group that admits this cgroup.
            let of_group = |guarding: &Guarding| {
                guarding.iter().copied().find(|index| {
                    let rule = document.rules.get(*index);
                    rule.is_some_and(|rule| rule.callers.iter().any(|caller| is_inside(inner, caller)))
                })
            };
            let found: Option<Vec<usize>> = groups.iter().map(of_group).collect();
            if let Some(first) = found.and_then(|found| found.first().copied()) {
                tables.callers.insert((*list, inner.clone()), first);
            }
        }
    }
}

/// Whether `inner` is `outer` or lies below it.
fn is_inside(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_inside_by_whole_names() {
        for (inner, outer, inside) in [
            ("/a", "/a", true),
            ("/a/b", "/a", true),
            ("/ab", "/a", false),
            ("/a", "/a/b", false),
            ("/b/a", "/a", false),
        ] {
            assert_eq!(is_inside(inner, outer), inside, "{inner} {outer}");
        }
    }
}
