//! Owns reading the maps into an image, from which a plan starts.
//! Called by `apply`, at start and to detect changes by others.
//! Must never write.

use std::collections::BTreeMap;

use aya::maps::{MapError, lpm_trie::Key};
use guard_common::abi::{Generation, MAX_PORT_WORDS, RULE_SLOTS};
use guard_policy::tables::image::{Entries, Followed, Image};

use crate::kernel::tables::{
    apply_error::{ApplyError, refused},
    large_map::LargeMap,
    ruleset_maps::{RulesetMaps, rule_name},
};

/// Reads the maps. With a known image, the names of rules and the bit map of port numbers are copied from it instead of being read.
pub(crate) fn read(maps: &RulesetMaps, known: Option<&Image>) -> Result<Image, ApplyError> {
    let mut image = Image {
        epoch: maps.active.get(&0, 0).map_err(|error| ApplyError::Map("ACTIVE", error))?.epoch,
        ..Image::default()
    };
    match known {
        Some(known) => {
            image.names.clone_from(&known.names);
            image.entries.port_numbers.clone_from(&known.entries.port_numbers);
        }
        None => read_rest(maps, &mut image)?,
    }
    let entries = &mut image.entries;
    let Entries { scopes, ports, scopes_copy, ports_copy, .. } = entries;
    let Entries { peers_v4, peers_v6, destinations, followed, .. } = entries;
    let Followed { callers, cgroups, namespaces, generations } = followed;
    for number in 0..2u8 {
        let generation =
            maps.generations.get(&u32::from(number), 0).map_err(|error| ApplyError::Map("GENERATIONS", error))?;
        if generation != Generation::default() {
            generations.insert(number, generation);
        }
    }
    collect(maps.callers.iter(), "CALLERS", |key, value| callers.insert(key, value))?;
    collect(maps.cgroups.iter(), "CGROUPS", |key, value| cgroups.insert(key, value))?;
    collect(maps.namespaces.iter(), "NAMESPACES", |key, value| namespaces.insert(key, value))?;
    *destinations = read_lpm(&maps.destinations, "DESTINATIONS")?;
    *scopes = read_lpm(&maps.scopes, "SCOPES")?;
    *scopes_copy = read_lpm(&maps.scopes_copy, "SCOPES_COPY")?;
    *ports = maps.ports.read().map_err(refused("PORTS"))?.into_iter().collect();
    *ports_copy = maps.ports_copy.read().map_err(refused("PORTS_COPY"))?.into_iter().collect();
    *peers_v4 = read_lpm(&maps.peers_v4, "PEERS_V4")?;
    *peers_v6 = read_lpm(&maps.peers_v6, "PEERS_V6")?;
    Ok(image)
}

/// Reads the names of rules and the bit map of port numbers.
fn read_rest(maps: &RulesetMaps, image: &mut Image) -> Result<(), ApplyError> {
    for slot in 0..RULE_SLOTS as u16 {
        let name = maps.names.get(&u32::from(slot), 0).map_err(|error| ApplyError::Map("RULE_NAMES", error))?;
        if let Some(name) = rule_name::read(&name) {
            image.names.insert(slot, name);
        }
    }
    for index in 0..MAX_PORT_WORDS {
        let word = maps.port_numbers.get(&index, 0).map_err(|error| ApplyError::Map("PORT_NUMBERS", error))?;
        if word != 0 {
            image.entries.port_numbers.insert(index, word);
        }
    }
    Ok(())
}

fn read_lpm<K: aya::Pod + Ord, V: aya::Pod>(
    table: &LargeMap<Key<K>, V>,
    name: &'static str,
) -> Result<BTreeMap<(u32, K), V>, ApplyError> {
    let entries = table.read().map_err(refused(name))?;
    Ok(entries.into_iter().map(|(key, value)| ((key.prefix_len(), key.data()), value)).collect())
}

fn collect<K, V, R>(
    entries: impl Iterator<Item = Result<(K, V), MapError>>,
    map: &'static str,
    mut insert: impl FnMut(K, V) -> R,
) -> Result<(), ApplyError> {
    for entry in entries {
        let (key, value) = entry.map_err(|error| ApplyError::Map(map, error))?;
        insert(key, value);
    }
    Ok(())
}
