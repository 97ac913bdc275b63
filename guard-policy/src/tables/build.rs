//! Owns the step from rules to the kernel's tables: each port of each scope, with everyone whom its rules allow.
//! Called by `compile`, with rules that have no errors.
//! Must never let one rule take away what another rule allows.

use std::collections::{BTreeMap, BTreeSet};

use guard_common::{abi::CgroupValue, packet::UDP};
use ipnet::IpNet;

use crate::{
    node_facts::NodeFacts,
    parse::checked::{CheckedDocument, GuardRule, PeerBlock},
    ruleset::{ALL_PODS_SCOPE, GuardedPort, Mode, NODE_SCOPE, PodsCgroup, PortRule, RulesetTables, ScopeNumber},
    tables::{destinations::destinations, peers::peers},
};

/// The indices of the rules that guard a port together, and the number of their peer list.
type Lists = BTreeMap<Vec<usize>, u32>;

/// Builds the kernel's tables.
pub(crate) fn tables(document: &CheckedDocument<'_>, node: &NodeFacts) -> RulesetTables {
    let rules = document.rules;
    let mut tables = RulesetTables { audit: document.audit, edge: document.edge.clone(), ..RulesetTables::default() };
    let mut lists = Lists::new();
    let all: Vec<usize> = (0..rules.len()).collect();
    let of = |index: &usize| rules.get(*index);
    add_scope(&mut tables, &mut lists, rules, NODE_SCOPE, &all, false);

    // Rules without prefixes guard the ports of every pod, including pods whose address lies in a prefix of another rule.
    let every: Vec<usize> = all.iter().copied().filter(|index| of(index).is_some_and(GuardRule::all_pods)).collect();
    if let Some(first) = every.first().and_then(of) {
        tables.pods_cgroup = Some(first.pods_cgroup.clone().map_or(PodsCgroup::Usual, PodsCgroup::Named));
        add_scope(&mut tables, &mut lists, rules, ALL_PODS_SCOPE, &every, true);
    }
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
        add_scope(&mut tables, &mut lists, rules, *scope, of_scope, true);
    }
    for address in &node.addresses {
        tables.scopes.insert(IpNet::from(*address), NODE_SCOPE);
    }
    for (guarding, list) in &lists {
        let blocks: Vec<PeerBlock> =
            guarding.iter().filter_map(of).flat_map(|rule| rule.blocks.iter().cloned()).collect();
        tables.peers.extend(peers(&blocks).into_iter().map(|(net, peer)| ((*list, net), peer)));
    }
    add_cgroups(&mut tables, &lists, document);
    destinations(&mut tables, document, node);
    tables
}

/// Adds the guarded ports of a scope.
fn add_scope(
    tables: &mut RulesetTables,
    lists: &mut Lists,
    rules: &[GuardRule],
    scope: ScopeNumber,
    of_scope: &[usize],
    pods: bool,
) {
    let mut by_port: BTreeMap<(u8, u16), Vec<usize>> = BTreeMap::new();
    for (index, rule) in of_scope.iter().filter_map(|index| rules.get(*index).map(|rule| (*index, rule))) {
        for port in if pods { &rule.pods } else { &rule.node }.iter().cloned().flatten() {
            let rules = by_port.entry((rule.protocol, port)).or_default();
            if rules.last() != Some(&index) {
                rules.push(index);
            }
        }
    }
    for ((protocol, port), guarding) in by_port {
        let number = lists.len() as u32;
        let list = *lists.entry(guarding.clone()).or_insert(number);
        let first = |allows: fn(&GuardRule) -> bool| {
            guarding.iter().copied().find(|index| rules.get(*index).is_some_and(allows))
        };
        let rule = PortRule {
            list,
            rule: guarding.first().copied().unwrap_or_default(),
            tunnel: first(|rule| rule.tunnel),
            node: first(|rule| rule.from_node),
            caller: first(|rule| !rule.callers.is_empty()).is_some(),
            audit: first(|rule| rule.mode == Mode::Enforce).is_none(),
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
    for (guarding, list) in lists {
        let callers =
            guarding.iter().filter_map(|index| document.rules.get(*index).map(|rule| (*index, &rule.callers)));
        for (index, caller) in callers.flat_map(|(index, callers)| callers.iter().map(move |caller| (index, caller))) {
            for inner in tables.cgroups.keys().filter(|inner| is_inside(inner, caller)) {
                tables.callers.entry((*list, inner.clone())).or_insert(index);
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
