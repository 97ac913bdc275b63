//! Owns the cgroups that a ruleset names, and the ids of those that exist.
//! Called by `kernel/tables/plan`; `kernel/cgroups/follow` looks up the ids.
//! Must never keep the id of a removed cgroup: a new one can have the same path.

use std::collections::{BTreeMap, BTreeSet};

use crate::ruleset::{PodsCgroup, Ruleset};

/// The paths that kubelet uses for the cgroup of the pods: with the systemd driver, with the cgroupfs driver, and inside a cgroup of its own (kind).
pub const USUAL_PODS: [&str; 4] =
    ["/kubepods.slice", "/kubepods", "/kubelet.slice/kubelet-kubepods.slice", "/kubelet/kubepods"];

/// The ids of the cgroups that exist, by path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups(BTreeMap<String, u64>);

impl Cgroups {
    /// The id of a cgroup, if it exists. On cgroup v2 it is the inode number of its directory.
    pub fn id(&self, path: &str) -> Option<u64> {
        self.0.get(path).copied()
    }

    /// The id of the cgroup of the pods, if it exists.
    pub fn pods(&self, pods: &PodsCgroup) -> Option<u64> {
        match pods {
            PodsCgroup::Named(path) => self.id(path),
            PodsCgroup::Usual => USUAL_PODS.iter().find_map(|path| self.id(path)),
        }
    }
}

impl FromIterator<(String, u64)> for Cgroups {
    fn from_iter<I: IntoIterator<Item = (String, u64)>>(ids: I) -> Cgroups {
        Cgroups(ids.into_iter().collect())
    }
}

/// The paths of all cgroups that a ruleset names.
pub fn paths(ruleset: &Ruleset) -> BTreeSet<String> {
    let pods = ruleset.tables.pods_cgroup.iter().flat_map(|pods| match pods {
        PodsCgroup::Named(path) => vec![path.clone()],
        PodsCgroup::Usual => USUAL_PODS.map(str::to_owned).to_vec(),
    });
    ruleset.tables.cgroups.keys().cloned().chain(pods).collect()
}
