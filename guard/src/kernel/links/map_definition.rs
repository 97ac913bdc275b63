//! Owns comparing maps by their definition: what a pinned one is, and what this build expects.
//! Called by `load` before a pinned map is adopted, and by `upgrade` for those of another build.
//! Must never take two maps for the same that differ in anything that the kernel tells.

use std::{collections::BTreeMap, fmt, path::Path};

use aya::maps::{MapError, MapInfo};

use crate::kernel::{error::LoadError, links::object::OBJECT};

/// What a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapDefinition {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
}

impl MapDefinition {
    /// A pinned map's.
    pub(crate) fn of_pin(path: &Path) -> Result<MapDefinition, MapError> {
        let info = MapInfo::from_pin(path)?;
        let kind = info.map_type()? as u32;
        Ok(MapDefinition { kind, key: info.key_size(), value: info.value_size(), entries: info.max_entries() })
    }

    /// Those of this build's object, by name.
    pub(crate) fn of_object() -> Result<BTreeMap<String, MapDefinition>, LoadError> {
        let object = aya_obj::Object::parse(OBJECT).map_err(LoadError::Object)?;
        let maps = object.maps.iter().filter(|(name, _)| !name.starts_with('.'));
        Ok(maps
            .map(|(name, map)| {
                let (kind, entries) = (map.map_type(), map.max_entries());
                (name.clone(), MapDefinition { kind, key: map.key_size(), value: map.value_size(), entries })
            })
            .collect())
    }
}

impl fmt::Display for MapDefinition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MapDefinition { kind, key, value, entries } = self;
        write!(f, "type {kind}, key {key}, value {value}, entries {entries}")
    }
}
