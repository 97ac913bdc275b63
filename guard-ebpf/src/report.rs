//! Owns what is told of a decision: exact per-CPU counters, and one event for each denial.
//! Called by `ingress` after every decision.
//! Must never change a verdict: what cannot be reported is counted as lost.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, programs::SkBuffContext};
use guard_common::{
    Decision, Listener, Reason, Verdict,
    abi::{DenyEvent, Health, counter_index},
};

use crate::maps::{COUNTERS, EVENTS, HEALTH};

/// Counts a decision and sends an event where it denies or would have denied.
#[inline(always)]
pub(crate) fn report(ctx: &SkBuffContext, listener: Listener, decision: &Decision) {
    if matches!(decision.reason, Reason::NotGuarded) {
        return;
    }
    increment(COUNTERS.get_ptr_mut(counter_index(decision.rule, decision.reason, decision.audited)));
    if matches!(decision.reason.verdict(), Verdict::Allow) {
        return;
    }
    diagnose(ctx, listener, decision);
    let Some(mut entry) = EVENTS.reserve::<DenyEvent>(0) else {
        lost(Health::EventsLost);
        return;
    };
    entry.write(DenyEvent {
        // SAFETY: the helper takes nothing.
        at_ns: unsafe { bpf_ktime_get_ns() },
        source: decision.flow.source,
        destination: decision.flow.destination,
        epoch: decision.epoch,
        source_port: decision.flow.source_port,
        port: listener.port,
        rule: decision.rule,
        reason: decision.reason as u8,
        audited: u8::from(decision.audited),
        reserved: [0; 4],
    });
    entry.submit(0);
}

/// Counts what this half could not do.
#[inline(always)]
pub(crate) fn lost(what: Health) {
    increment(HEALTH.get_ptr_mut(what as u32));
}

#[inline(always)]
fn increment(counter: Option<*mut u64>) {
    if let Some(counter) = counter {
        // SAFETY: the slot belongs to this CPU, and programs of this hook do not nest on one CPU.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
}

#[cfg(feature = "log")]
#[inline(always)]
fn diagnose(ctx: &SkBuffContext, listener: Listener, decision: &Decision) {
    aya_log_ebpf::debug!(ctx, "deny port {} rule {} reason {}", listener.port, decision.rule, decision.reason as u8);
}

#[cfg(not(feature = "log"))]
#[inline(always)]
fn diagnose(_ctx: &SkBuffContext, _listener: Listener, _decision: &Decision) {}
