//! Owns what is told of a decision: exact per-CPU counters, and events of denials, as many as anybody can read.
//! Called by `ingress` after every decision, and by `connect` after every denial.
//! Must never change a verdict, and never leave a packet uncounted: what is not told is counted by why.

use aya_ebpf::{EbpfContext, helpers::generated::bpf_ktime_get_coarse_ns};
use guard_common::{
    Decision, Destination, Reached, Reason, Tables, Verdict,
    abi::{DenyEvent, FlowKey, Health, NO_RULE, Told, counter_index},
};

use crate::maps::{COUNTERS, EVENTS, HEALTH, KernelTables, TOLD};

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
    // SAFETY: the helper takes nothing (5.11).
    let at_ns = unsafe { bpf_ktime_get_coarse_ns() };
    let Some(repeats) = worth_telling(at_ns, port, decision) else { return };
    let Some(mut entry) = EVENTS.reserve::<DenyEvent>(0) else {
        lost(Health::EventsLost);
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

/// Whether this denial is told, and how many like it went untold: one of a kind a second, and no more than the budget of all kinds.
#[inline(always)]
fn worth_telling(at_ns: u64, port: u16, decision: &Decision) -> Option<u32> {
    let second = (at_ns >> 30) as u32;
    let tag = kind(port, decision);
    let told = slot(tag % Told::SLOTS)?;
    let repeats = if told.tag == tag { told.repeats } else { 0 };
    if told.tag == tag && told.window == second {
        told.repeats = repeats.wrapping_add(1);
        lost(Health::EventsRepeated);
        return None;
    }
    let budget = slot(Told::SLOTS)?;
    let slice = (at_ns >> 26) as u32;
    if budget.window != slice {
        *budget = Told { tag: 0, window: slice, repeats: 0 };
    }
    if budget.tag >= Told::BUDGET {
        lost(Health::EventsSampled);
        return None;
    }
    budget.tag = budget.tag.wrapping_add(1);
    *told = Told { tag, window: second, repeats: 0 };
    Some(repeats)
}

#[inline(always)]
fn slot(index: u32) -> Option<&'static mut Told> {
    // SAFETY: the slot belongs to this CPU; a preempted program can at worst tell one event more or less.
    TOLD.get_ptr_mut(index).map(|slot| unsafe { &mut *slot })
}

/// A hash of who is denied what and why. Not of the source port: an attempt is repeated from another one.
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
    // FNV-1a by words, and a last mix so that the low bits of addresses reach the slot number.
    let hash = words.iter().fold(0x811c_9dc5u32, |hash, word| (hash ^ word).wrapping_mul(0x0100_0193));
    hash ^ (hash >> 15)
}

/// Counts and tells a connection attempt that is, or would be, denied. No rule is reached: who may connect where is not a rule's.
#[inline(always)]
pub(crate) fn report_reach<C: EbpfContext>(ctx: &C, destination: Destination, reached: &Reached) {
    let Some(reason) = reached.denied else { return };
    let flow = FlowKey { destination: destination.address, ..FlowKey::default() };
    let audited = matches!(reached.verdict, Verdict::Allow);
    let epoch = KernelTables.in_force().epoch;
    let decision = Decision { verdict: reached.verdict, reason, rule: NO_RULE, audited, epoch, flow };
    report(ctx, destination.port, &decision);
}

/// Counts what this half could not do.
#[inline(always)]
pub(crate) fn lost(what: Health) {
    increment(HEALTH.get_ptr_mut(what as u32));
}

/// Counts one packet for a rule, whatever the reason.
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
