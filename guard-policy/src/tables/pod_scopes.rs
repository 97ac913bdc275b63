//! Owns the network namespaces of this node whose addresses are known, and the scope of each.
//! Called by `kernel/tables/plan`; `kernel/namespaces` reads them from the machine.
//! Must never give a scope to a namespace that two different sets of rules claim: then the address of each packet decides.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    ruleset::{ALL_PODS_SCOPE, NODE_SCOPE, RulesetTables, ScopeNumber},
    tables::cgroups::Cgroups,
};

/// What changes on a node while a ruleset is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The cgroups that the ruleset names.
    pub cgroups: Cgroups,
    /// The network namespaces.
    pub namespaces: Namespaces,
}

/// The addresses of each network namespace but the node's own, by the namespace's cookie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces(BTreeMap<u64, BTreeSet<IpAddr>>);

impl Namespaces {
    /// The scope of each namespace that has one, in the order of the cookies. None if no rule guards pods.
    pub fn scopes<'a>(&'a self, tables: &'a RulesetTables) -> impl Iterator<Item = (u64, ScopeNumber)> + 'a {
        let guards_pods = tables.pods_cgroup.is_some();
        let known = self.0.iter().filter(move |_| guards_pods);
        known.filter_map(|(cookie, addresses)| Some((*cookie, scope(tables, addresses)?)))
    }
}

impl FromIterator<(u64, BTreeSet<IpAddr>)> for Namespaces {
    fn from_iter<I: IntoIterator<Item = (u64, BTreeSet<IpAddr>)>>(found: I) -> Namespaces {
        Namespaces(found.into_iter().collect())
    }
}

/// The scope of a pod with these addresses: that of the prefixes around them; [`ALL_PODS_SCOPE`] if no rule names a prefix around any.
/// `None` for a pod without an address yet, and for one that different rules claim.
fn scope(tables: &RulesetTables, addresses: &BTreeSet<IpAddr>) -> Option<ScopeNumber> {
    let mut own = addresses.iter().filter(|address| !is_everywhere(**address)).peekable();
    own.peek()?;
    let scopes: BTreeSet<ScopeNumber> = own.filter_map(|address| tables.scope_at(*address)).collect();
    let mut scopes = scopes.into_iter().filter(|scope| *scope != NODE_SCOPE);
    match (scopes.next(), scopes.next()) {
        (None, _) => Some(ALL_PODS_SCOPE),
        (one, None) => one,
        (Some(_), Some(_)) => None,
    }
}

/// Loopback and link-local addresses: every namespace may have them.
fn is_everywhere(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::PodsCgroup;

    #[test]
    fn a_namespace_has_the_scope_of_its_addresses() {
        let scopes = [("10.244.1.0/24", 1), ("fd00:1::/64", 1), ("10.9.0.0/16", 2), ("10.0.0.2/32", NODE_SCOPE)];
        let tables = RulesetTables {
            scopes: scopes.map(|(net, scope)| (net.parse().unwrap(), scope)).into(),
            pods_cgroup: Some(PodsCgroup::Usual),
            ..RulesetTables::default()
        };
        for (addresses, wanted) in [
            (&["10.244.1.7"][..], Some(1)),
            (&["127.0.0.1", "fe80::1", "10.244.1.7", "192.168.50.5", "fd00:1::7"], Some(1)),
            (&["172.17.0.2"], Some(ALL_PODS_SCOPE)),
            (&["10.0.0.2"], Some(ALL_PODS_SCOPE)),
            (&["10.244.1.7", "10.9.0.7"], None),
            (&["127.0.0.1", "::1", "fe80::1"], None),
            (&[], None),
        ] {
            let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
            let namespaces: Namespaces = [(9, addresses)].into_iter().collect();
            assert_eq!(namespaces.scopes(&tables).next().map(|(_, scope)| scope), wanted);
            assert_eq!(namespaces.scopes(&RulesetTables::default()).next(), None);
        }
    }
}
