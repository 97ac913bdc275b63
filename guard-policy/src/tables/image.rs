//! Owns the entries of the kernel's tables, as ordinary collections.
//! Called by the plan of an edit, by the read-back of the tables and by the host's own run of `decide`.
//! Must never hold what the kernel's tables cannot hold.

use std::collections::BTreeMap;

use guard_common::{
    RulesetInForce, RulesetSwitch,
    abi::{
        CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey, DestinationValue, Generation, PeerKey4,
        PeerKey6, PeerValue, PortKey, PortValue, ScopeKey, ScopeValue,
    },
};

/// The entries of the tables, both generations. An LPM key is preceded by its prefix length in bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// Destination prefixes.
    pub scopes: BTreeMap<(u32, ScopeKey), ScopeValue>,
    /// Guarded ports.
    pub ports: BTreeMap<PortKey, PortValue>,
    /// The copy of `scopes`.
    pub scopes_copy: BTreeMap<(u32, ScopeKey), ScopeValue>,
    /// The copy of `ports`, those of destinations left out.
    pub ports_copy: BTreeMap<PortKey, PortValue>,
    /// The numbers of the ports in it: the words that are not zero.
    pub port_numbers: BTreeMap<u32, u64>,
    /// IPv4 peers.
    pub peers_v4: BTreeMap<(u32, PeerKey4), PeerValue>,
    /// IPv6 peers.
    pub peers_v6: BTreeMap<(u32, PeerKey6), PeerValue>,
    /// Prefixes of destinations.
    pub destinations: BTreeMap<(u32, DestinationKey), DestinationValue>,
    /// What there is of cgroups.
    pub followed: Followed,
}

/// The entries that follow the node's cgroups: these change in the generation in force, each by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// Cgroups that a peer list admits.
    pub callers: BTreeMap<CallerKey, CallerValue>,
    /// Cgroups that the policy names.
    pub cgroups: BTreeMap<CgroupKey, CgroupValue>,
    /// What has to be known of a generation first, by its number.
    pub generations: BTreeMap<u8, Generation>,
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
