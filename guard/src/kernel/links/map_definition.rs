//! Owns the definition of a map: that of a pinned map, and that which this build expects.
//! Called by `programs` before it adopts a pinned map, and by `upgrade` for the maps of another build.
//! Must never treat two maps as equal if they differ in anything that the kernel reports.

use std::{collections::BTreeMap, fmt, path::Path};

use aya::maps::{MapError, MapInfo};
use aya_obj::ParseError;

use crate::kernel::links::object::OBJECT;

/// The definition of a map: the number of its type, the sizes of keys and values in bytes, and the largest number of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapDefinition {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
}

impl MapDefinition {
    /// The definition of a pinned map.
    pub(crate) fn of_pin(path: &Path) -> Result<MapDefinition, MapError> {
        let info = MapInfo::from_pin(path)?;
        let kind = info.map_type()? as u32;
        Ok(MapDefinition { kind, key: info.key_size(), value: info.value_size(), entries: info.max_entries() })
    }

    /// The definitions in this build's object, by name.
    pub(crate) fn of_object() -> Result<BTreeMap<String, MapDefinition>, ParseError> {
        let object = aya_obj::Object::parse(OBJECT)?;
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
        write!(f, "type {kind}, {key}-byte keys, {value}-byte values, {entries} entries")
    }
}
