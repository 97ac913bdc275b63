//! Owns the status: everything that the guard knows of itself at one moment, as one type.
//! Called by the daemon and by `stopped`, which fill it; made into tables, JSON and metrics by the rest of the room.
//! Must never hold a value without a type: its JSON is published as `docs/status.schema.json`.

use guard_policy::ruleset::{Mode, RuleSummary, Ruleset};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{
    dial::{
        connections::{DialCounts, RefusedDial},
        dialling::Dialling,
    },
    kernel::{
        links::{
            edge_hooks::EdgeLink,
            programs::{Attachment, NamespaceBy, PinnedMap},
        },
        observe::{
            events::Denial,
            map_use::{MapUse, ProgramUse},
            packets::{LossCounter, PacketCounter},
        },
    },
    report::weakness::Weakness,
    tunnel::handle::TunnelState,
};

/// The version of the JSON. A change that could break a reader gets another version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ApiVersion {
    /// The first version.
    #[default]
    #[serde(rename = "nodeguard.dev/status/v1")]
    V1,
}

/// What `nodeguard status -o json` prints: everything that the guard knows of itself at one moment.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(title = "Nodeguard status")]
pub struct Status {
    /// The version of this document.
    pub api_version: ApiVersion,
    /// Whether the daemon answered. If it did not, everything is read from the pinned maps and links.
    pub daemon: bool,
    /// The policy's mode; null if no policy is known.
    #[schemars(schema_with = "mode_schema")]
    pub mode: Option<Mode>,
    /// The policy in force.
    pub policy: PolicyStatus,
    /// The kernel programs.
    pub programs: Vec<Attachment>,
    /// How the programs find the network namespace of a listener; null without the daemon or without a kernel half.
    pub namespace_by: Option<NamespaceBy>,
    /// The pinned maps.
    pub maps: Vec<PinnedMap>,
    /// The edge tier, by interface.
    pub edge: Vec<EdgeLink>,
    /// How full the maps are.
    pub map_use: Vec<MapUse>,
    /// How often and how long the programs ran, if the kernel measures it.
    pub program_use: Vec<ProgramUse>,
    /// The tunnel; null without the daemon.
    pub tunnel: Option<TunnelState>,
    /// Packets to guarded ports, by rule and reason.
    pub counters: Vec<PacketCounter>,
    /// What the kernel programs lost or left out.
    pub health: Vec<LossCounter>,
    /// The number of open connections that were cut because the policy in force denies them.
    pub cut: u64,
    /// The number of pins, links and tables that were restored after something else removed or changed them.
    pub mended: u64,
    /// The last denials, the newest last.
    pub last_denies: Vec<Denial>,
    /// The last refused dials, the newest last.
    pub last_refused_dials: Vec<RefusedDial>,
    /// Dials by outcome; null without the daemon.
    pub dials: Option<DialCounts>,
    /// Dials by outcome, reason, size and time; the audit file; checked certificates; watched Services.
    pub dialling: Dialling,
    /// What weakens protection right now.
    pub weakened: Vec<Weakness>,
}

/// The policy in force.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// `metadata.name`.
    pub name: String,
    /// The path of the file.
    pub path: String,
    /// SHA-256 of the document.
    pub digest: String,
    /// The epoch in force; 0 if there is none.
    pub epoch: u32,
    /// Since when it is in force, RFC 3339.
    pub since: Option<String>,
    /// The rules.
    pub rules: Vec<RuleStatus>,
    /// Why the last edit is not in force, if it is not.
    pub last_error: Option<String>,
}

/// A rule of the policy in force.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct RuleStatus {
    /// Its name.
    pub name: String,
    /// Its mode; null without the daemon.
    #[schemars(schema_with = "mode_schema")]
    pub mode: Option<Mode>,
    /// What it guards, in words.
    pub guards: String,
    /// Whom it allows, in words.
    pub allows: String,
}

impl PolicyStatus {
    /// A ruleset as it is shown. The caller adds what it knows besides: the path, the epoch, since when, the last error.
    pub fn of(ruleset: &Ruleset) -> PolicyStatus {
        PolicyStatus {
            name: ruleset.name.clone(),
            digest: ruleset.digest.clone(),
            rules: ruleset.rules.iter().map(RuleStatus::of).collect(),
            ..PolicyStatus::default()
        }
    }
}

impl RuleStatus {
    fn of(rule: &RuleSummary) -> RuleStatus {
        RuleStatus {
            name: rule.name.clone(),
            mode: Some(rule.mode),
            guards: rule.guards.clone(),
            allows: rule.allows.clone(),
        }
    }
}

/// The policy crate knows no schemas.
fn mode_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": ["string", "null"], "enum": ["Enforce", "Audit", null] })
}

#[cfg(test)]
#[path = "status_tests.rs"]
pub(crate) mod tests;
