//! Owns taking a snapshot of the guard for `status`: from the running daemon, or from the pins alone.
//! Called by `admin` on each request, and by the `status` command if no daemon answers.
//! Must never change anything.

use std::path::Path;

use guard_common::{Reason, Verdict, abi::NO_RULE};

use crate::{
    kernel,
    kernel::{
        links::programs::{attachments, pinned_maps},
        tables::{apply::Apply, ruleset_maps::RulesetMaps},
    },
    report::status::{Counter, Policy, Rule, Status},
};

/// What the pins alone say.
pub fn from_pins(bpffs: &Path) -> Status {
    let apply = RulesetMaps::pinned(bpffs).ok().and_then(|maps| Apply::new(maps).ok());
    let programs = attachments(bpffs);
    let in_force = apply.as_ref().map(Apply::in_force).unwrap_or_default();
    let mut weakened: Vec<String> = Vec::new();
    let attached = programs.iter().filter(|program| program.attached).count();
    if attached < programs.len() || in_force.epoch == 0 {
        weakened.push("this node is not guarded: no ruleset is in force or a program is not attached".to_owned());
    } else {
        weakened.push(
            "no daemon: guarded ports stay guarded, but nothing comes through the tunnel and edits are not seen"
                .to_owned(),
        );
    }
    let rules = in_force.names.values().map(|name| Rule { name: name.clone(), ..Rule::default() }).collect();
    Status {
        policy: Policy { epoch: in_force.epoch, rules, ..Policy::default() },
        programs,
        maps: pinned_maps(bpffs),
        edge: kernel::links::edge_tier::links(bpffs),
        map_use: apply.as_ref().map(Apply::map_use).unwrap_or_default(),
        program_use: kernel::observe::map_use::programs(bpffs),
        counters: apply.as_ref().map(counters).unwrap_or_default(),
        weakened,
        ..Status::default()
    }
}

/// Whether a rule guards ports of every pod and nobody can tell which these are.
pub(crate) fn pods_unknown(apply: &Apply) -> bool {
    apply.followed().is_some_and(|(ruleset, cgroups)| {
        ruleset.tables.pods_cgroup.as_ref().is_some_and(|pods| cgroups.pods(pods).is_none())
    })
}

pub(crate) fn counters(apply: &Apply) -> Vec<Counter> {
    let names = apply.in_force().names;
    let name = |slot: u16| {
        if slot == NO_RULE { "-".to_owned() } else { names.get(&slot).cloned().unwrap_or_else(|| "-".to_owned()) }
    };
    let counter = |(slot, reason, audited, packets): (u16, Reason, bool, u64)| {
        let verdict = match reason.verdict() {
            Verdict::Allow => "Allow",
            Verdict::Deny if audited => "Allow",
            Verdict::Deny => "Deny",
        };
        Counter { rule: name(slot), reason: reason.name().to_owned(), verdict: verdict.to_owned(), audited, packets }
    };
    apply.counters().unwrap_or_default().into_iter().map(counter).collect()
}

/// Each as JSON.
pub(crate) fn values<T: serde::Serialize>(items: Vec<T>) -> Vec<serde_json::Value> {
    items.into_iter().filter_map(|item| serde_json::to_value(item).ok()).collect()
}
