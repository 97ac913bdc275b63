//! Owns the status of a guard without a daemon, read from the pins alone.
//! Called by the `status` command if no daemon answers.
//! Must never change anything.

use std::path::Path;

use crate::{
    kernel::{
        links::{
            edge_tier,
            programs::{attachments, pinned_maps},
        },
        observe::{map_use, packets},
        tables::{apply::Apply, ruleset_maps::RulesetMaps},
    },
    report::{
        status::{PolicyStatus, RuleStatus, Status},
        weakness::WeaknessReason,
    },
};

/// The status that the pins alone show.
pub fn from_pins(bpffs: &Path) -> Status {
    let apply = RulesetMaps::pinned(bpffs).ok().and_then(|maps| Apply::new(maps).ok());
    let programs = attachments(bpffs);
    let in_force = apply.as_ref().map(Apply::in_force).unwrap_or_default();
    let guarded = programs.iter().all(|program| program.attached) && in_force.epoch != 0;
    let weakness = if guarded {
        WeaknessReason::NoDaemon.says(
            "the daemon does not run: guarded ports stay guarded, but nothing comes through the tunnel and edits have no effect",
        )
    } else {
        WeaknessReason::NotGuarded.says("this node is not guarded: no ruleset is in force or a program is not attached")
    };
    let rules =
        in_force.names.values().map(|name| RuleStatus { name: name.clone(), ..RuleStatus::default() }).collect();
    Status {
        policy: PolicyStatus { epoch: in_force.epoch, rules, ..PolicyStatus::default() },
        programs,
        maps: pinned_maps(bpffs),
        edge: edge_tier::links(bpffs),
        map_use: apply.as_ref().map(Apply::map_use).unwrap_or_default(),
        program_use: map_use::programs(bpffs),
        counters: apply.as_ref().map(packets::packets).unwrap_or_default(),
        weakened: vec![weakness],
        ..Status::default()
    }
}
