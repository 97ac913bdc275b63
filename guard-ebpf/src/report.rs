//! Owns the report of a decision: exact per-CPU counters and rate-limited denial events.
//! Called by `ingress` after every decision, by `edge` and `connect` after every denial, and by `flows` for a pinhole that did not fit.
//! Must never change a verdict, and never leave a packet uncounted: a suppressed event is counted under the reason.

use aya_ebpf::EbpfContext;
use guard_common::{
    Decision, Destination, Reached, Reason, Verdict,
    abi::{DenyEvent, EventSlot, FlowKey, HealthCounter, NO_RULE, counter_index},
};

use crate::{
    clock::coarse_nanoseconds,
    maps::{COUNTERS, EVENTS, HEALTH, TOLD},
};

/// Counts a decision about a packet to `port`, and sends an event if it denies or would have denied. A function of its own, because a
/// program's stack is small.
#[inline(never)]
pub(crate) fn report<C: EbpfContext>(ctx: &C, port: u16, decision: &Decision) {
    if matches!(decision.reason, Reason::NotGuarded) {
        return;
    }
    increment(COUNTERS.get_ptr_mut(counter_index(decision.rule, decision.reason, decision.audited)));
    if matches!(decision.reason.verdict(), Verdict::Allow) {
        return;
    }
    diagnose(ctx, port, decision);
    let at_ns = coarse_nanoseconds();
    let Some(repeats) = worth_telling(at_ns, port, decision) else { return };
    let Some(mut entry) = EVENTS.reserve::<DenyEvent>(0) else {
        lost(HealthCounter::EventsLost);
        return;
    };
    entry.write(DenyEvent {
        at_ns,
        source: decision.flow.source,
        destination: decision.flow.destination,
        epoch: decision.epoch,
        source_port: decision.flow.source_port,
        port,
        rule: decision.rule,
        reason: decision.reason as u8,
        audited: u8::from(decision.audited),
        repeats,
    });
    entry.submit(0);
}

/// Whether an event is sent for this denial, and how many of its kind were suppressed since the last one: one event per kind and second,
/// within the budget of all kinds.
#[inline(always)]
fn worth_telling(at_ns: u64, port: u16, decision: &Decision) -> Option<u32> {
    let second = (at_ns >> 30) as u32;
    let tag = kind(port, decision);
    let told = slot(tag % EventSlot::SLOTS)?;
    let repeats = if told.tag == tag { told.repeats } else { 0 };
    if told.tag == tag && told.window == second {
        told.repeats = repeats.wrapping_add(1);
        lost(HealthCounter::EventsRepeated);
        return None;
    }
    let budget = slot(EventSlot::SLOTS)?;
    let slice = (at_ns >> 26) as u32;
    if budget.window != slice {
        *budget = EventSlot { tag: 0, window: slice, repeats: 0 };
    }
    if budget.tag >= EventSlot::BUDGET {
        lost(HealthCounter::EventsSampled);
        return None;
    }
    budget.tag = budget.tag.wrapping_add(1);
    *told = EventSlot { tag, window: second, repeats: 0 };
    Some(repeats)
}

#[inline(always)]
fn slot(index: u32) -> Option<&'static mut EventSlot> {
    // SAFETY: the slot belongs to this CPU; a preempted program can at worst send one event more or less.
    TOLD.get_ptr_mut(index).map(|slot| unsafe { &mut *slot })
}

/// A hash of source, port, rule and reason. Not of the source port: a repeated attempt comes from another one.
#[inline(always)]
fn kind(port: u16, decision: &Decision) -> u32 {
    let s = &decision.flow.source;
    let words = [
        u32::from_ne_bytes([s[0], s[1], s[2], s[3]]),
        u32::from_ne_bytes([s[4], s[5], s[6], s[7]]),
        u32::from_ne_bytes([s[8], s[9], s[10], s[11]]),
        u32::from_ne_bytes([s[12], s[13], s[14], s[15]]),
        (u32::from(port) << 16) | u32::from(decision.rule),
        decision.reason as u32,
    ];
    // FNV-1a by words, with a final mix so that every bit of an address reaches the slot number.
    let hash = words.iter().fold(0x811c_9dc5u32, |hash, word| (hash ^ word).wrapping_mul(0x0100_0193));
    hash ^ (hash >> 15)
}

/// Reports a connection attempt that is, or would be, denied. It is counted under no rule: a rule says who may reach a port.
#[inline(always)]
pub(crate) fn report_reach<C: EbpfContext>(ctx: &C, destination: Destination, reached: &Reached) {
    let Some(reason) = reached.denied else { return };
    let flow = FlowKey { destination: destination.address, ..FlowKey::default() };
    let audited = matches!(reached.verdict, Verdict::Allow);
    let decision = Decision { verdict: reached.verdict, reason, rule: NO_RULE, audited, epoch: reached.epoch, flow };
    report(ctx, destination.port, &decision);
}

/// Counts what the kernel half could not do.
#[inline(always)]
pub(crate) fn lost(what: HealthCounter) {
    increment(HEALTH.get_ptr_mut(what as u32));
}

/// Counts one packet under a rule, whatever the reason.
#[cfg(feature = "probe")]
#[inline(always)]
pub(crate) fn count(rule: u16) {
    increment(COUNTERS.get_ptr_mut(counter_index(rule, Reason::NoSelector, false)));
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
