//! Owns what is told of a decision: exact per-CPU counters, and one event for each denial.
//! Called by `ingress` after every decision, and by `connect` after every denial.
//! Must never change a verdict: what cannot be reported is counted as lost.

use aya_ebpf::{EbpfContext, helpers::generated::bpf_ktime_get_ns};
use guard_common::{
    Decision, Destination, Reached, Reason, Tables, Verdict,
    abi::{DenyEvent, FlowKey, Health, NO_RULE, counter_index},
};

use crate::maps::{COUNTERS, EVENTS, HEALTH, KernelTables};

/// Counts a decision about a packet for `port` and sends an event where it denies or would have denied.
#[inline(always)]
pub(crate) fn report<C: EbpfContext>(ctx: &C, port: u16, decision: &Decision) {
    if matches!(decision.reason, Reason::NotGuarded) {
        return;
    }
    increment(COUNTERS.get_ptr_mut(counter_index(decision.rule, decision.reason, decision.audited)));
    if matches!(decision.reason.verdict(), Verdict::Allow) {
        return;
    }
    diagnose(ctx, port, decision);
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
        port,
        rule: decision.rule,
        reason: decision.reason as u8,
        audited: u8::from(decision.audited),
        reserved: [0; 4],
    });
    entry.submit(0);
}

/// Counts and tells a connection attempt that is, or would be, denied. No rule is reached: who may connect where is not a rule's.
#[inline(always)]
pub(crate) fn report_reach<C: EbpfContext>(ctx: &C, destination: Destination, reached: &Reached) {
    let Some(reason) = reached.denied else { return };
    let flow = FlowKey { destination: destination.address, ..FlowKey::default() };
    let audited = matches!(reached.verdict, Verdict::Allow);
    let epoch = KernelTables.epoch();
    let decision = Decision { verdict: reached.verdict, reason, rule: NO_RULE, audited, epoch, flow };
    report(ctx, destination.port, &decision);
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
fn diagnose<C: EbpfContext>(ctx: &C, port: u16, decision: &Decision) {
    aya_log_ebpf::debug!(ctx, "deny port {} rule {} reason {}", port, decision.rule, decision.reason as u8);
}

#[cfg(not(feature = "log"))]
#[inline(always)]
fn diagnose<C: EbpfContext>(_ctx: &C, _port: u16, _decision: &Decision) {}
