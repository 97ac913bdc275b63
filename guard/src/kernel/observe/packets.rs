//! Owns the counters of the kernel programs as `status` and the metrics show them.
//! Called by the daemon and by `report`.
//! Must never count itself: the counters are the kernel's.

use std::borrow::Cow;

use aya::maps::{MapData, PerCpuArray};
use guard_common::{
    Reason, Verdict,
    abi::{HealthCounter, NO_RULE},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernel::tables::apply::Apply;

/// Packets of one rule and reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PacketCounter {
    /// The rule's name; `-` for packets that reached no rule.
    pub rule: String,
    /// The stable name of the reason.
    pub reason: Cow<'static, str>,
    /// `Allow` or `Deny`: what happened, not what would have happened without `Audit`.
    pub verdict: Cow<'static, str>,
    /// Whether a denial was only counted.
    pub audited: bool,
    /// The number of packets.
    pub packets: u64,
}

/// What the kernel programs could not do, or left out on purpose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LossCounter {
    /// What was lost or left out.
    pub name: Cow<'static, str>,
    /// How often.
    pub count: u64,
    /// Whether it weakens protection.
    pub weakens: bool,
}

/// The counters of packets.
pub fn packets(apply: &Apply) -> Vec<PacketCounter> {
    let names = apply.in_force().names;
    let name = |slot: u16| names.get(&slot).filter(|_| slot != NO_RULE).cloned().unwrap_or_else(|| "-".to_owned());
    let counter = |(slot, reason, audited, packets): (u16, Reason, bool, u64)| {
        let verdict = match reason.verdict() {
            Verdict::Allow => "Allow",
            Verdict::Deny if audited => "Allow",
            Verdict::Deny => "Deny",
        };
        PacketCounter { rule: name(slot), reason: reason.name().into(), verdict: verdict.into(), audited, packets }
    };
    apply.counters().unwrap_or_default().into_iter().map(counter).collect()
}

/// The counters of losses.
pub fn losses(counters: &PerCpuArray<MapData, u64>) -> Vec<LossCounter> {
    let counter = |loss: HealthCounter| LossCounter {
        name: loss.name().into(),
        count: counters.get(&(loss as u32), 0).map(|values| values.iter().sum()).unwrap_or(0),
        weakens: loss.is_loss(),
    };
    HealthCounter::ALL.into_iter().map(counter).collect()
}
