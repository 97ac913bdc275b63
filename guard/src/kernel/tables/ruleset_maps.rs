//! Owns the maps of the ruleset, with their types.
//! Called by `links/programs` (all maps), by `report` (from the pins alone) and by `apply` for every write.
//! Must never be written by anything but `apply`.

use std::path::Path;

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, lpm_trie::Key},
};
use guard_common::abi::{
    Active, CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey, DestinationValue, Generation, Judged,
    NamespaceKey, NamespaceValue, PeerKey4, PeerKey6, PeerValue, PortKey, PortValue, RuleName, ScopeKey, ScopeValue,
};

use crate::kernel::{error::LoadError, pins::pins, tables::large_map::LargeMap};

/// The maps of the ruleset.
pub struct RulesetMaps {
    pub(crate) active: Array<MapData, Active>,
    pub(crate) generations: Array<MapData, Generation>,
    pub(crate) scopes: LargeMap<Key<ScopeKey>, ScopeValue>,
    pub(crate) ports: LargeMap<PortKey, PortValue>,
    /// The copies that a program also reads before a port counts as not guarded.
    pub(crate) scopes_copy: LargeMap<Key<ScopeKey>, ScopeValue>,
    pub(crate) ports_copy: LargeMap<PortKey, PortValue>,
    pub(crate) port_numbers: Array<MapData, u64>,
    pub(crate) peers_v4: LargeMap<Key<PeerKey4>, PeerValue>,
    pub(crate) peers_v6: LargeMap<Key<PeerKey6>, PeerValue>,
    pub(crate) destinations: LargeMap<Key<DestinationKey>, DestinationValue>,
    pub(crate) callers: HashMap<MapData, CallerKey, CallerValue>,
    pub(crate) cgroups: HashMap<MapData, CgroupKey, CgroupValue>,
    pub(crate) namespaces: HashMap<MapData, NamespaceKey, NamespaceValue>,
    pub(crate) names: Array<MapData, RuleName>,
    pub(crate) counters: PerCpuArray<MapData, u64>,
    /// The counters from before an upgrade from another ABI.
    pub(crate) carried: Array<MapData, u64>,
}

impl RulesetMaps {
    /// Takes the maps out of a loaded object.
    pub fn take(ebpf: &mut Ebpf) -> Result<RulesetMaps, LoadError> {
        RulesetMaps::open(|name| take(ebpf, name))
    }

    /// Opens the pinned maps. This needs neither a loaded program nor a running daemon.
    pub fn pinned(bpffs: &Path) -> Result<RulesetMaps, LoadError> {
        let pins = pins(bpffs);
        RulesetMaps::open(|name| pinned_map(&pins, name))
    }

    fn open(mut map: impl FnMut(&'static str) -> Result<Map, LoadError>) -> Result<RulesetMaps, LoadError> {
        Ok(RulesetMaps {
            active: Array::try_from(map("ACTIVE")?)?,
            generations: Array::try_from(map("GENERATIONS")?)?,
            scopes: LargeMap::of(map("SCOPES")?)?,
            ports: LargeMap::of(map("PORTS")?)?,
            scopes_copy: LargeMap::of(map("SCOPES_COPY")?)?,
            ports_copy: LargeMap::of(map("PORTS_COPY")?)?,
            port_numbers: Array::try_from(map("PORT_NUMBERS")?)?,
            peers_v4: LargeMap::of(map("PEERS_V4")?)?,
            peers_v6: LargeMap::of(map("PEERS_V6")?)?,
            destinations: LargeMap::of(map("DESTINATIONS")?)?,
            callers: HashMap::try_from(map("CALLERS")?)?,
            cgroups: HashMap::try_from(map("CGROUPS")?)?,
            namespaces: HashMap::try_from(map("NAMESPACES")?)?,
            names: Array::try_from(map("RULE_NAMES")?)?,
            counters: PerCpuArray::try_from(map("COUNTERS")?)?,
            carried: Array::try_from(map("CARRIED")?)?,
        })
    }
}

/// Opens a map by its pin. The loaded object keeps its own descriptors, because programs that are loaded later refer to them by number.
pub(crate) fn pinned_map(pins: &Path, name: &str) -> Result<Map, LoadError> {
    Ok(Map::from_map_data(MapData::from_pin(pins.join("maps").join(name))?)?)
}

pub(crate) fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, LoadError> {
    ebpf.take_map(name).ok_or(LoadError::Missing(name))
}

/// Clears the hand-over slot, so that a program attached later does not act on a stale entry.
pub(crate) fn forget_judged(pins: &Path) -> Result<(), LoadError> {
    let mut judged: PerCpuArray<MapData, Judged> = PerCpuArray::try_from(pinned_map(pins, "JUDGED")?)?;
    let nothing = vec![Judged::default(); judged.get(&0, 0)?.len()];
    Ok(judged.set(0, PerCpuValues::try_from(nothing).map_err(MapError::IoError)?, 0)?)
}

/// The encoding of rule names in the table of names.
pub(crate) mod rule_name {
    use guard_common::abi::RuleName;

    pub(crate) fn write(name: &str) -> RuleName {
        let mut bytes = [0; RuleName::LEN];
        for (to, from) in bytes.iter_mut().zip(name.as_bytes()) {
            *to = *from;
        }
        RuleName { bytes }
    }

    /// `None` if the slot is free.
    pub(crate) fn read(name: &RuleName) -> Option<String> {
        let end = name.bytes.iter().position(|byte| *byte == 0).unwrap_or(RuleName::LEN);
        (end > 0).then(|| String::from_utf8_lossy(&name.bytes[..end]).into_owned())
    }
}
