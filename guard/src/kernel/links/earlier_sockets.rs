//! Owns telling the programs whose the sockets are that were there before the guard, on a kernel that does not tell it (before Linux 6.15).
//! Called by `programs` when the programs that note new sockets are attached, and before one that judges is.
//! Must never name a socket by anything but its cookie, which the kernel never gives out twice.

use std::{collections::BTreeMap, path::Path};

use aya::maps::{HashMap, MapData};

use crate::kernel::{
    cut::sock_diag::receivers,
    error::{LoadError, at},
    namespaces::{self, Found, in_namespace},
    syscalls,
    tables::ruleset_maps::pinned_map,
};

/// Enters the listeners and unconnected UDP sockets of every network namespace that can be entered. A socket that is not found stays unknown:
/// it is judged as the node's and as a pod's. Returns whether the sockets of the node's own namespace are known.
pub(crate) fn tell(pins: &Path) -> Result<bool, LoadError> {
    let mut table: HashMap<MapData, u64, u64> = pinned_map(pins, "EARLIER_SOCKETS")?.try_into()?;
    let Found { namespaces, incomplete } = namespaces::find().map_err(at(Path::new("/proc/self/ns/net")))?;
    let (mut known, mut knows_own) = (BTreeMap::new(), true);
    for (number, (_, namespace)) in namespaces.iter().enumerate() {
        match in_namespace(namespace, || Ok((syscalls::netns_cookie()?, receivers()?))) {
            Ok((netns, (sockets, complete))) => {
                known.extend(sockets.into_iter().map(|socket| (socket, netns)));
                knows_own &= complete;
            }
            Err(error) if number > 0 => {
                tracing::debug!(%error, "a network namespace cannot be entered: its earlier sockets are judged as the node's and as a pod's");
            }
            Err(error) => {
                knows_own = false;
                tracing::error!(
                    %error,
                    "the node's sockets cannot be listed (this needs the kernel modules inet_diag, tcp_diag and udp_diag): those from before the guard are judged as the node's and as a pod's, and denied by either"
                );
            }
        }
    }
    let before: Vec<u64> = table.keys().flatten().collect();
    for gone in before.iter().filter(|socket| !known.contains_key(socket)) {
        table.remove(gone)?;
    }
    let sockets = known.len();
    for (socket, netns) in known {
        table.insert(socket, netns, 0)?;
    }
    tracing::info!(sockets, incomplete, "noted whose the sockets are that were there before");
    Ok(knows_own)
}
