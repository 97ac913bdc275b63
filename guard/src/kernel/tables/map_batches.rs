//! Owns the bpf(2) calls on the entries of a map, single and in batches. The eBPF library has no batches.
//! Called by `large_map` and `observe/map_use`.
//! Must never know what a map means: keys and values are plain bytes here.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd},
};

use aya::{Pod, maps::MapFd};

use crate::kernel::syscalls::bpf;

// Commands of `enum bpf_cmd` in the kernel's include/uapi/linux/bpf.h; the batches since 5.6.
const LOOKUP_ELEM: libc::c_long = 1;
const UPDATE_ELEM: libc::c_long = 2;
const DELETE_ELEM: libc::c_long = 3;
const GET_NEXT_KEY: libc::c_long = 4;
const LOOKUP_BATCH: libc::c_long = 24;
const UPDATE_BATCH: libc::c_long = 26;
const DELETE_BATCH: libc::c_long = 27;
/// The kernel's internal `ENOTSUPP`, which it returns for a type of map without batch calls.
const ENOTSUPP: i32 = 524;

/// The attributes of a call for one entry.
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    /// The value, or the next key.
    value: u64,
    flags: u64,
}

/// The attributes of a call for many entries.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// The outcome of a batch.
pub(crate) enum BatchResult {
    /// All entries were processed: this many.
    Done(usize),
    /// The kernel has no such call for this type of map, and nothing was done.
    Unknown,
    /// An error after this many entries.
    Stopped(usize, io::Error),
}

/// Where the next look-up continues: at a key, or at a bucket number in a hash map.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union BatchCursor<K: Pod> {
    key: MaybeUninit<K>,
    bucket: u64,
}

/// Writes an entry.
pub(crate) fn update<K: Pod, V: Pod>(map: &MapFd, key: &K, value: &V) -> io::Result<()> {
    let value = std::ptr::from_ref(value) as u64;
    bpf(UPDATE_ELEM, &mut ElementAttr { value, ..element(map, Some(key)) }).map(drop)
}

/// Removes an entry.
pub(crate) fn delete<K: Pod>(map: &MapFd, key: &K) -> io::Result<()> {
    bpf(DELETE_ELEM, &mut element(map, Some(key))).map(drop)
}

/// The value of an entry, if it exists.
pub(crate) fn lookup<K: Pod, V: Pod>(map: &MapFd, key: &K) -> io::Result<Option<V>> {
    answer(LOOKUP_ELEM, map, Some(key))
}

/// The key after `key`, or the first key.
pub(crate) fn next_key<K: Pod>(map: &MapFd, key: Option<&K>) -> io::Result<Option<K>> {
    answer(GET_NEXT_KEY, map, key)
}

/// Writes entries. `keys` and `values` must have the same length.
pub(crate) fn update_batch<K: Pod, V: Pod>(map: &MapFd, keys: &[K], values: &[V]) -> BatchResult {
    let count = keys.len().min(values.len()) as u32;
    let (keys, values) = (keys.as_ptr() as u64, values.as_ptr() as u64);
    run(UPDATE_BATCH, BatchAttr { keys, values, count, map_fd: map.as_fd().as_raw_fd() as u32, ..BatchAttr::default() })
}

/// Removes entries. Stops with `ENOENT` at an entry that does not exist.
pub(crate) fn delete_batch<K: Pod>(map: &MapFd, keys: &[K]) -> BatchResult {
    let (count, keys) = (keys.len() as u32, keys.as_ptr() as u64);
    run(DELETE_BATCH, BatchAttr { keys, count, map_fd: map.as_fd().as_raw_fd() as u32, ..BatchAttr::default() })
}

/// Reads up to `most` entries from the cursor on, and advances it. `ENOENT` means the end of the map; the entries found before are valid.
pub(crate) fn lookup_batch<K: Pod, V: Pod>(
    map: &MapFd,
    place: &mut Option<BatchCursor<K>>,
    most: usize,
) -> (Vec<(K, V)>, BatchResult) {
    let mut keys: Vec<K> = Vec::with_capacity(most);
    let mut values: Vec<V> = Vec::with_capacity(most);
    let mut next = BatchCursor { bucket: 0 };
    let result = run(
        LOOKUP_BATCH,
        BatchAttr {
            in_batch: place.as_ref().map_or(0, |place| std::ptr::from_ref(place) as u64),
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: most as u32,
            map_fd: map.as_fd().as_raw_fd() as u32,
            ..BatchAttr::default()
        },
    );
    let found = match &result {
        BatchResult::Done(count) => *count,
        BatchResult::Stopped(count, error) if error.raw_os_error() == Some(libc::ENOENT) => *count,
        BatchResult::Stopped(..) | BatchResult::Unknown => 0,
    }
    .min(most);
    // SAFETY: the kernel has written `found` entries, and any bytes are a valid `Pod`.
    unsafe {
        keys.set_len(found);
        values.set_len(found);
    }
    *place = Some(next);
    (keys.into_iter().zip(values).collect(), result)
}

fn element<K: Pod>(map: &MapFd, key: Option<&K>) -> ElementAttr {
    ElementAttr {
        map_fd: map.as_fd().as_raw_fd() as u32,
        key: key.map_or(0, |key| std::ptr::from_ref(key) as u64),
        ..ElementAttr::default()
    }
}

fn answer<K: Pod, A: Pod>(command: libc::c_long, map: &MapFd, key: Option<&K>) -> io::Result<Option<A>> {
    let mut answer = MaybeUninit::<A>::uninit();
    match bpf(command, &mut ElementAttr { value: answer.as_mut_ptr() as u64, ..element(map, key) }) {
        // SAFETY: the kernel has written the answer, and any bytes are a valid `Pod`.
        Ok(_) => Ok(Some(unsafe { answer.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn run(command: libc::c_long, mut attr: BatchAttr) -> BatchResult {
    let wanted = attr.count;
    match bpf(command, &mut attr) {
        Ok(_) => BatchResult::Done(attr.count as usize),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP) => BatchResult::Unknown,
            // After an error before the first entry, the count is unchanged.
            Some(_) | None => BatchResult::Stopped(if attr.count < wanted { attr.count as usize } else { 0 }, error),
        },
    }
}
