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
    dial::{connections::Connections, serve::Dialer},
    kernel,
    kernel::{
        links::{
            edge_hooks::EdgeLink,
            programs::{Programs, attachments, pinned_maps},
        },
        observe::{events::DenialLog, map_use::MapCounter},
        tables::apply::{AppliedRuleset, Apply},
    },
    report::{
        admin::Snapshots,
        dialling::Dialling,
        edge,
        snapshot::{counters, pods_unknown, values},
        status::{Health, Policy, Rule, Status},
        usage,
    },
    sys::lock::lock,
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

    /// For the readiness detail: that the last edit is not in force, and why, without what the document says there.
    pub fn remark(&self) -> Option<String> {
        let why: Vec<&str> = self.last_error.as_deref()?.lines().take(2).map(str::trim).collect();
        Some(format!("policy-edit not in force: {}", why.join(" ")))
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
    /// Whether a listener's network namespace is told by its cookie.
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

impl Snapshots for Guard {
    fn status(&self) -> Status {
        let current = lock(&self.current);
        let ruleset = current.ruleset.as_deref();
        let (in_force, counters, pods_unknown, mut map_use) = {
            let apply = lock(&self.apply);
            (apply.in_force(), counters(&apply), pods_unknown(&apply), apply.map_use())
        };
        map_use.extend(lock(&self.usage).tables());
        let programs = attachments(&self.bpffs);
        let edge = edge::now(&self.edge.load(), kernel::links::edge_tier::links(&self.bpffs));
        let health: Vec<Health> = guard_common::abi::HealthCounter::ALL
            .iter()
            .map(|lost| Health {
                name: lost.name().to_owned(),
                count: self.lost.get(&(*lost as u32), 0).map(|values| values.iter().sum()).unwrap_or(0),
            })
            .collect();
        let mut weakened: Vec<String> = programs
            .iter()
            .filter(|program| !program.attached)
            .map(|program| format!("{} is not attached: guarded ports are open", program.name))
            .collect();
        if current.last_error.is_some() {
            weakened.push("the last edit of the policy is not in force (see below)".to_owned());
        }
        if ruleset.is_some_and(|ruleset| ruleset.mode == Mode::Audit) {
            weakened.push("the policy only audits: nothing is denied".to_owned());
        }
        if pods_unknown {
            weakened.push(
                "the cgroup of the pods is not there (it has to be on cgroup v2, below --cgroup): where a rule guards ports of every pod, each listener that is not the node's counts as a pod's"
                    .to_owned(),
            );
        }
        weakened.extend(edge::weakened(&edge));
        weakened.extend(usage::weakened(&map_use));
        if self.uncut.load(Ordering::Relaxed) {
            weakened
                .push("connections may be open that the policy in force does not admit (the log says why)".to_owned());
        }
        if self.blind.load(Ordering::Relaxed) {
            weakened.push(
                "connections that pods had before an edit are not cut by it: not all of their network namespaces can be entered (that takes hostPID, CAP_SYS_ADMIN and CAP_SYS_PTRACE)"
                    .to_owned(),
            );
        }
        let losses =
            guard_common::abi::HealthCounter::ALL.into_iter().filter(|health| health.is_loss()).map(|loss| loss.name());
        let losses: Vec<&str> = losses.collect();
        let lost = health.iter().filter(|health| health.count > 0 && losses.contains(&health.name.as_str()));
        weakened.extend(lost.map(|lost| format!("{} {}", lost.count, lost.name)));
        let dialling = Dialling::of(&self.dialer);
        weakened.extend(dialling.weakened());
        weakened.extend(self.tunnel.weakened());
        let rule = |rule: &guard_policy::ruleset::RuleSummary| Rule {
            name: rule.name.clone(),
            mode: format!("{:?}", rule.mode),
            guards: rule.guards.clone(),
            allows: rule.allows.clone(),
        };
        let policy = Policy {
            name: ruleset.map(|ruleset| ruleset.name.clone()).unwrap_or_default(),
            path: self.policy.display().to_string(),
            digest: ruleset.map(|ruleset| ruleset.digest.clone()).unwrap_or_default(),
            epoch: in_force.epoch,
            since: current.since.clone(),
            rules: ruleset.map(|ruleset| ruleset.rules.iter().map(rule).collect()).unwrap_or_default(),
            last_error: current.last_error.clone(),
        };
        Status {
            daemon: true,
            mode: ruleset.map(|ruleset| format!("{:?}", ruleset.mode)).unwrap_or_default(),
            policy,
            programs,
            namespace_by: if self.netns_helper { "cookie" } else { "address" }.to_owned(),
            maps: pinned_maps(&self.bpffs),
            edge,
            map_use,
            program_use: kernel::observe::map_use::programs(&self.bpffs),
            tunnel: self.tunnel.snapshot(),
            counters,
            health,
            cut: self.cut.load(Ordering::Relaxed),
            mended: self.mended.load(Ordering::Relaxed),
            last_denies: values(self.denials.last()),
            last_refused_dials: values(self.connections.last_refused()),
            dials: serde_json::to_value(self.connections.counts()).unwrap_or_default(),
            dialling,
            weakened,
        }
    }

    const CHECKS: &'static [(&'static str, &'static str)] = &[
        ("programs-attached", "guarded ports are open"),
        ("policy-in-force", "none is"),
        ("server-connected", "no servers connected"),
    ];

    fn unready(&self) -> Vec<&'static str> {
        let mut unready = Vec::new();
        if !attachments(&self.bpffs).iter().all(|program| program.attached) {
            unready.push("programs-attached");
        }
        if lock(&self.current).ruleset.is_none() {
            unready.push("policy-in-force");
        }
        if !self.tunnel.connected() {
            unready.push("server-connected");
        }
        unready
    }

    fn remarks(&self) -> Vec<String> {
        lock(&self.current).remark().into_iter().collect()
    }

    fn more(&self) -> Option<(&'static str, bool, String)> {
        self.dialer.services.readiness()
    }
}
