//! Owns removing the guard from the kernel: it removes all pins, and reports which ports are open afterwards.
//! Called by `main` for `nodeguard unpin` only.
//! Must never run by itself: enforcement outlives the daemon on purpose.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, Map, MapData};
use guard_common::abi::{Active, PortKey, PortValue, ScopeValue};

use crate::kernel::{links::upgrade, pins::pins};

/// What was removed, and which ports are open afterwards.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Unpinned {
    /// The removed pins.
    pub removed: Vec<PathBuf>,
    /// The node's ports that were guarded and are now open to everyone who can reach them, sorted.
    pub node_ports: Vec<u16>,
    /// The same for ports of pods.
    pub pod_ports: Vec<u16>,
}

/// Removes the links first (enforcement ends with the last of them), then the programs and the maps. Pins of other ABIs are removed too.
pub fn unpin(bpffs: &Path) -> io::Result<Unpinned> {
    let pins = pins(bpffs);
    let mut unpinned = guarded_ports(&pins);
    for directory in upgrade::directories(bpffs)? {
        unpinned.removed.extend(upgrade::remove(&directory)?);
    }
    match fs::remove_dir(bpffs) {
        // The directory is the mount point itself, or it has pins of someone else.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY | libc::ENOTEMPTY | libc::EPERM)) => {}
        other => other?,
    }
    unpinned.removed.sort();
    Ok(unpinned)
}

/// The guarded ports of the ruleset in force; empty if the pinned maps cannot be read.
fn guarded_ports(pins: &Path) -> Unpinned {
    let mut unpinned = Unpinned::default();
    let map = |name: &str| MapData::from_pin(pins.join("maps").join(name)).and_then(Map::from_map_data);
    let (Ok(active), Ok(ports)) = (map("ACTIVE"), map("PORTS_COPY")) else { return unpinned };
    let (Ok(active), Ok(ports)) =
        (Array::<_, Active>::try_from(active), HashMap::<_, PortKey, PortValue>::try_from(ports))
    else {
        return unpinned;
    };
    let Ok(generation) = active.get(&0, 0).map(Active::generation) else { return unpinned };
    for key in ports.keys().flatten().filter(|key| key.generation == generation) {
        if key.scope == ScopeValue::NODE { &mut unpinned.node_ports } else { &mut unpinned.pod_ports }.push(key.port);
    }
    for ports in [&mut unpinned.node_ports, &mut unpinned.pod_ports] {
        ports.sort_unstable();
        ports.dedup();
    }
    unpinned
}
