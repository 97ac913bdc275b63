//! Owns the test-run entry points of the development object: the decision with a listener taken from a map.
//! Called by tests through `BPF_PROG_TEST_RUN`, where the kernel gives a dummy socket that no `ingress` run would judge.
//! Must never be in the object that the daemon loads.

use aya_ebpf::{
    macros::{cgroup_skb, map},
    maps::Array,
    programs::SkBuffContext,
};
use guard_common::{Listener, Scope, Verdict, abi::Probe, decide};

use crate::{maps::KernelTables, window::Window};

#[map]
static PROBE: Array<Probe> = Array::with_max_entries(1, 0);

/// Decides by direct access where the window allows.
#[cgroup_skb(ingress)]
fn probe_direct(ctx: SkBuffContext) -> i32 {
    probe(&ctx, false)
}

/// Decides by helper loads alone.
#[cgroup_skb(ingress)]
fn probe_helper(ctx: SkBuffContext) -> i32 {
    probe(&ctx, true)
}

#[inline(always)]
fn probe(ctx: &SkBuffContext, helper_only: bool) -> i32 {
    let Some(slot) = PROBE.get_ptr_mut(0) else { return 0 };
    // SAFETY: an array slot; tests run one packet at a time.
    let slot = unsafe { &mut *slot };
    let scope = match slot.scope {
        0 => Scope::Node,
        1 => Scope::Pod,
        _ => Scope::Unknown,
    };
    let listener = Listener { scope, port: slot.port, protocol: slot.protocol, in_pods: slot.in_pods != 0 };
    let decision = decide(&Window { ctx, helper_only }, listener, &KernelTables);
    slot.flow = decision.flow;
    slot.epoch = decision.epoch;
    slot.rule = decision.rule;
    slot.reason = decision.reason as u8;
    slot.audited = u8::from(decision.audited);
    match decision.verdict {
        Verdict::Allow => 1,
        Verdict::Deny => 0,
    }
}
