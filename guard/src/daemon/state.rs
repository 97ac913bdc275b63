//! Owns what the running daemon knows of itself: the policy, the kernel half, the dials, the tunnel.
//! Called by the parts of the daemon, and by the admin socket for a snapshot.
//! Must never be written by two: each field names its one writer.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use aya::maps::{MapData, PerCpuArray};
use guard_policy::{
    diagnostic::Rejected,
    policy_file::LoadedPolicy,
    ruleset::{Mode, Ruleset},
};

use crate::{
    cluster::services::known::Services,
    dial::{connections::Connections, dialling::Dialling, serve::Dialer},
    kernel::{
        links::{
            edge_hooks::EdgeLink,
            edge_tier,
            programs::{NamespaceBy, Programs, attachments, pinned_maps},
        },
        observe::{
            events::DenialLog,
            map_use,
            map_use::MapCounter,
            packets::{losses, packets},
        },
        tables::apply::{AppliedRuleset, Apply},
    },
    report::{
        admin::Served,
        assess::weaknesses,
        readiness::{Check, Readiness},
        status::{PolicyStatus, Status},
        weakness::{Weakness, WeaknessReason},
    },
    sys::{lock::lock, place::Place},
    tunnel::handle::Tunnel,
};

/// The policy as the daemon knows it.
#[derive(Default)]
pub struct Current {
    /// What is in force; `None` where only the kernel holds one, from before.
    pub ruleset: Option<Arc<Ruleset>>,
    /// RFC 3339: when it came into force.
    pub since: Option<String>,
    /// Why the last edit is not in force.
    pub last_error: Option<String>,
}

impl Current {
    /// A document came into force.
    pub fn took(&mut self, loaded: &LoadedPolicy) {
        let since = jiff::Timestamp::now().to_string();
        *self = Current { ruleset: Some(Arc::clone(&loaded.ruleset)), since: Some(since), last_error: None };
    }

    /// A document was not taken.
    pub fn rejected(&mut self, rejected: &Rejected) {
        self.last_error = Some(rejected.render(false));
    }

    /// For readiness: that the last edit is not in force, and why, without the text of the document.
    pub fn remark(&self) -> Option<Weakness> {
        let why: Vec<&str> = self.last_error.as_deref()?.lines().take(2).map(str::trim).collect();
        Some(WeaknessReason::PolicyEdit.says(format!("not in force: {}", why.join(" "))))
    }

    /// The policy as `status` shows it.
    pub fn status(&self, path: String, epoch: u32) -> PolicyStatus {
        PolicyStatus {
            path,
            epoch,
            since: self.since.clone(),
            last_error: self.last_error.clone(),
            ..self.ruleset.as_deref().map(PolicyStatus::of).unwrap_or_default()
        }
    }

    /// The mode of the policy in force.
    pub fn mode(&self) -> Option<Mode> {
        self.ruleset.as_ref().map(|ruleset| ruleset.mode)
    }

    /// A document could not be brought into the kernel.
    pub fn failed(&mut self, error: String) {
        self.last_error = Some(error);
    }
}

/// The parts of the daemon that a snapshot is taken of.
pub struct Guard {
    /// The policy file.
    pub policy: PathBuf,
    /// Where the kernel half is pinned.
    pub bpffs: PathBuf,
    /// What the programs are attached to.
    pub cgroup: PathBuf,
    /// How many open connections were cut.
    pub cut: AtomicU64,
    /// Whether connections are open that should have been cut.
    pub uncut: AtomicBool,
    /// Whether pods may have connections that the guard does not see.
    pub blind: AtomicBool,
    /// What is weak about the place where the daemon was started.
    pub misplaced: Vec<Weakness>,
    /// Whether the kernel tells the network namespace of a packet's socket (Linux 6.15); otherwise a note on the socket does.
    pub netns_helper: bool,
    /// The programs and their links.
    pub programs: Mutex<Programs>,
    /// How much was mended because somebody else removed or changed it.
    pub mended: AtomicU64,
    /// The policy.
    pub current: Mutex<Current>,
    /// The one writer of the ruleset's maps, which also reads the counters.
    pub apply: Mutex<Apply>,
    /// What the kernel half could not do.
    pub lost: PerCpuArray<MapData, u64>,
    /// What is in force in the kernel.
    pub in_force: Arc<ArcSwap<AppliedRuleset>>,
    /// How full the maps are.
    pub usage: Mutex<MapCounter>,
    /// The edge tier, as it was found last.
    pub edge: ArcSwap<Vec<EdgeLink>>,
    /// The last denials.
    pub denials: Arc<DenialLog>,
    /// The dials.
    pub connections: Arc<Connections>,
    /// What makes them.
    pub dialer: Arc<Dialer>,
    /// The tunnel.
    pub tunnel: Arc<Tunnel>,
}

impl Served for Guard {
    fn status(&self) -> Status {
        let current = lock(&self.current);
        let (in_force, counters, pods_unknown, mut map_use) = {
            let apply = lock(&self.apply);
            (apply.in_force(), packets(&apply), pods_unknown(&apply), apply.map_use())
        };
        map_use.extend(lock(&self.usage).tables());
        let mut status = Status {
            daemon: true,
            mode: current.mode(),
            policy: current.status(self.policy.display().to_string(), in_force.epoch),
            programs: attachments(&self.bpffs),
            namespace_by: Some(if self.netns_helper { NamespaceBy::Cookie } else { NamespaceBy::Mark }),
            maps: pinned_maps(&self.bpffs),
            edge: EdgeLink::now(&self.edge.load(), edge_tier::links(&self.bpffs)),
            map_use,
            program_use: map_use::programs(&self.bpffs),
            tunnel: Some(self.tunnel.state()),
            counters,
            health: losses(&self.lost),
            cut: self.cut.load(Ordering::Relaxed),
            mended: self.mended.load(Ordering::Relaxed),
            last_denies: self.denials.last(),
            last_refused_dials: self.connections.last_refused(),
            dials: Some(self.connections.counts()),
            dialling: Dialling::of(&self.dialer),
            ..Status::default()
        };
        status.weakened = weaknesses(&status);
        status.weakened.extend(self.own_weaknesses(pods_unknown));
        status
    }

    fn readiness(&self) -> Readiness {
        let attached = attachments(&self.bpffs).iter().all(|program| program.attached);
        let current = lock(&self.current);
        let mut checks = vec![
            Check::new("programs-attached", attached, "guarded ports are open"),
            Check::new("policy-in-force", current.ruleset.is_some(), "none is"),
            connected(&self.tunnel),
        ];
        checks.extend(services_read(&self.dialer.services));
        Readiness { checks, remarks: current.remark().into_iter().collect() }
    }
}

impl Guard {
    /// The weaknesses that only the daemon knows of.
    fn own_weaknesses(&self, pods_unknown: bool) -> impl Iterator<Item = Weakness> {
        let unknown = pods_unknown.then(|| {
            WeaknessReason::PodsUnknown.says(
                "the cgroup of the pods does not exist (it must be on cgroup v2, below --cgroup): where a rule guards ports of every pod, each listener that is not the node's counts as a pod's",
            )
        });
        let uncut = self.uncut.load(Ordering::Relaxed).then(|| {
            WeaknessReason::Uncut
                .says("connections may be open that the policy in force does not admit (the log has the reason)")
        });
        let unseen = self.blind.load(Ordering::Relaxed).then(|| {
            WeaknessReason::PodsUnseen.says(
                "connections that pods had before an edit are not cut by it, and a pod at an address in no prefix of a rule is denied what any rule for pods denies: not all network namespaces can be entered (this needs hostPID, CAP_SYS_ADMIN and CAP_SYS_PTRACE)",
            )
        });
        self.misplaced.iter().cloned().chain([unknown, uncut, unseen].into_iter().flatten())
    }
}

/// What is weak about a place. A cgroup below the root is what the operator asked for, if `--cgroup` names it.
pub(crate) fn misplaced(place: Place, whole_node: bool) -> Vec<Weakness> {
    let network = place.other_network_namespace.then(|| {
        WeaknessReason::OtherNetworkNamespace.says(
            "the daemon is in another network namespace than the machine's first process: `node` means this namespace, and the machine's own ports are not guarded (a pod needs hostNetwork: true)",
        )
    });
    let cgroup = (whole_node && place.cgroup_below_root).then(|| {
        WeaknessReason::CgroupBelowRoot.says(
            "the cgroup v2 hierarchy that is mounted here is not the machine's root: only sockets below this cgroup are guarded (a pod needs the host's /sys/fs/cgroup as a hostPath volume; or name a directory with --cgroup)",
        )
    });
    network.into_iter().chain(cgroup).collect()
}

/// Whether a rule guards ports of every pod and the cgroup of the pods is not found.
fn pods_unknown(apply: &Apply) -> bool {
    apply.followed().is_some_and(|(ruleset, cgroups)| {
        ruleset.tables.all_pods && ruleset.tables.pods_cgroup.as_ref().is_some_and(|pods| cgroups.pods(pods).is_none())
    })
}

/// The check that a stream takes dials.
pub(crate) fn connected(tunnel: &Tunnel) -> Check {
    Check::new("server-connected", tunnel.connected(), "no servers connected")
}

/// The check that Services were read, if they are watched.
pub(crate) fn services_read(services: &Services) -> Option<Check> {
    let (name, holds, detail) = services.readiness()?;
    Some(Check { name, holds, detail: Some(detail) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_place_is_a_weakness_and_a_chosen_cgroup_is_none() {
        let reasons = |other_network_namespace, cgroup_below_root, whole_node| {
            let place = Place { other_network_namespace, cgroup_below_root };
            misplaced(place, whole_node).iter().map(|weakness| weakness.reason.name()).collect::<Vec<_>>()
        };
        assert_eq!(reasons(true, true, true), ["other-network-namespace", "cgroup-below-root"]);
        assert_eq!(reasons(true, true, false), ["other-network-namespace"]);
        assert!(reasons(false, false, true).is_empty());
    }
}
