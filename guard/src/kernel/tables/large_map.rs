//! Owns a map that may have a hundred thousand entries: one system call writes, removes or reads many of them.
//! Called by `apply` and `read_back` through `ruleset_maps`.
//! Must never depend on the kernel's batch calls: if a kernel has none for this type of map, each entry takes one call.

use std::{io, marker::PhantomData};

use aya::{
    Pod,
    maps::{Map, MapData, MapError},
};

use crate::kernel::tables::{map_batches, map_batches::BatchResult};

/// The number of entries in one system call.
const CHUNK: usize = 1 << 14;

/// A hash map or a longest-prefix map.
pub(crate) struct LargeMap<K, V> {
    /// The original descriptor, not a copy: programs of the same object that are loaded later refer to their maps by its number.
    map: MapData,
    of: PhantomData<fn() -> (K, V)>,
}

impl<K: Pod, V: Pod> LargeMap<K, V> {
    /// Wraps a map. Fails if its keys and values do not have these sizes.
    pub(crate) fn of(map: Map) -> Result<LargeMap<K, V>, MapError> {
        let (Map::LpmTrie(map) | Map::HashMap(map)) = map else {
            return Err(MapError::InvalidMapType { map_type: 0 });
        };
        let info = map.info()?;
        for (size, expected) in [(size_of::<K>(), info.key_size()), (size_of::<V>(), info.value_size())] {
            if size != expected as usize {
                return Err(MapError::InvalidKeySize { size, expected: expected as usize });
            }
        }
        Ok(LargeMap { map, of: PhantomData })
    }

    /// Writes entries in the given order.
    pub(crate) fn put(&self, entries: &[(K, V)]) -> io::Result<()> {
        for chunk in entries.chunks(CHUNK) {
            let (keys, values): (Vec<K>, Vec<V>) = chunk.iter().copied().unzip();
            match map_batches::update_batch(self.map.fd(), &keys, &values) {
                BatchResult::Done(_) => {}
                BatchResult::Unknown => {
                    chunk.iter().try_for_each(|(key, value)| map_batches::update(self.map.fd(), key, value))?
                }
                BatchResult::Stopped(_, error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes entries. An entry that does not exist is not an error.
    pub(crate) fn remove(&self, keys: &[K]) -> io::Result<()> {
        let mut left = keys;
        while !left.is_empty() {
            let (now, _) = left.split_at(left.len().min(CHUNK));
            let done = match map_batches::delete_batch(self.map.fd(), now) {
                BatchResult::Done(count) => count,
                // The batch ends at an entry that does not exist.
                BatchResult::Stopped(count, error) if error.raw_os_error() == Some(libc::ENOENT) => count + 1,
                BatchResult::Stopped(_, error) => return Err(error),
                BatchResult::Unknown => {
                    now.iter().try_for_each(|key| absent_is_fine(map_batches::delete(self.map.fd(), key)))?;
                    now.len()
                }
            };
            left = left.get(done.max(1)..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads every entry.
    pub(crate) fn read(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut place: Option<map_batches::BatchCursor<K>> = None;
        loop {
            let (found, result) = map_batches::lookup_batch(self.map.fd(), &mut place, CHUNK);
            entries.extend(found);
            match result {
                BatchResult::Done(_) => {}
                BatchResult::Stopped(_, error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(entries),
                // Someone else changes the map meanwhile, or the kernel has no batch call: read entry by entry.
                BatchResult::Stopped(..) | BatchResult::Unknown => return self.read_singly(),
            }
        }
    }

    fn read_singly(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut key = map_batches::next_key::<K>(self.map.fd(), None)?;
        while let Some(at) = key {
            if let Some(value) = map_batches::lookup(self.map.fd(), &at)? {
                entries.push((at, value));
            }
            key = map_batches::next_key(self.map.fd(), Some(&at))?;
        }
        Ok(entries)
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Ok(()) | Err(_) => result,
    }
}
