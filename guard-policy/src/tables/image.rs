//! Owns the entries of the kernel's tables as ordinary collections.
//! Called by `kernel/tables/plan`, by `kernel/tables/read_back` and by `host`, which runs `decide` on them.
//! Must never hold what the kernel's tables cannot hold.

use std::collections::BTreeMap;

use guard_common::{
    RulesetInForce, RulesetSwitch,
    abi::{
        CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey, DestinationValue, Generation, NamespaceKey,
        NamespaceValue, PeerKey4, PeerKey6, PeerValue, PortKey, PortValue, ScopeKey, ScopeValue,
    },
};

/// The entries of the tables, of both generations. A key of a longest-prefix table is paired with its prefix length in bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// The scopes of destination prefixes.
    pub scopes: BTreeMap<(u32, ScopeKey), ScopeValue>,
    /// Guarded ports.
    pub ports: BTreeMap<PortKey, PortValue>,
    /// The copy of `scopes`.
    pub scopes_copy: BTreeMap<(u32, ScopeKey), ScopeValue>,
    /// The copy of `ports`, without the ports of destinations.
    pub ports_copy: BTreeMap<PortKey, PortValue>,
    /// The bit map of the port numbers in `ports_copy`: the words that are not zero.
    pub port_numbers: BTreeMap<u32, u64>,
    /// IPv4 peers.
    pub peers_v4: BTreeMap<(u32, PeerKey4), PeerValue>,
    /// IPv6 peers.
    pub peers_v6: BTreeMap<(u32, PeerKey6), PeerValue>,
    /// Destinations of the companion and of the hub rule.
    pub destinations: BTreeMap<(u32, DestinationKey), DestinationValue>,
    /// The entries that depend on cgroups and network namespaces.
    pub followed: Followed,
}

/// The entries that follow the node's cgroups and network namespaces. They change one by one in the generation in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// Cgroups that a peer list admits.
    pub callers: BTreeMap<CallerKey, CallerValue>,
    /// Cgroups that the policy names.
    pub cgroups: BTreeMap<CgroupKey, CgroupValue>,
    /// Network namespaces whose addresses are known.
    pub namespaces: BTreeMap<NamespaceKey, NamespaceValue>,
    /// The header of each generation, by its number: epoch, features, the cgroup of the pods.
    pub generations: BTreeMap<u8, Generation>,
}

/// Everything that the maps hold for a ruleset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// The active epoch; 0 means that no ruleset was ever in force.
    pub epoch: u32,
    /// The names of the used rule slots.
    pub names: BTreeMap<u16, String>,
    /// The entries of the tables.
    pub entries: Entries,
}

impl Image {
    /// The ruleset in force, as a program reads it from these tables.
    pub fn in_force(&self) -> RulesetInForce {
        RulesetInForce::read(self)
    }
}

impl RulesetSwitch for Image {
    fn active(&self) -> u32 {
        self.epoch
    }

    fn generation(&self, number: u8) -> Generation {
        self.entries.followed.generations.get(&number).copied().unwrap_or_default()
    }
}
