//! Owns the enforcing hook: cgroup_skb/ingress, every packet that a socket below the cgroup is about to receive.
//! Called by the kernel from `sk_filter_trim_cap`, after DNAT, on loopback too, for every network namespace.
//! Must never touch what is not for a listener: established traffic leaves after one load.
//!
//! There are two of it, each in a link of its own: whoever detaches one opens nothing. The one that comes second to a packet leaves the
//! judgement, its counters and its events to the first.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use guard_common::{
    Listener, Reason, Verdict,
    abi::{Judged, Pinhole},
    decide,
    packet::UDP,
};

use crate::{
    egress::touch,
    maps::{JUDGED, KernelTables},
    report::report,
    socket::{in_pods, listening, scope},
    window::Window,
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// Judges a packet to a listener: pinhole, then peer, else deny.
#[cgroup_skb(ingress)]
fn guard_ingress(ctx: SkBuffContext) -> i32 {
    judge(&ctx, Judged::FIRST)
}

/// The same again, for when the other one is gone.
#[cgroup_skb(ingress)]
fn guard_ingress_too(ctx: SkBuffContext) -> i32 {
    judge(&ctx, Judged::SECOND)
}

#[inline(always)]
fn judge(ctx: &SkBuffContext, by: u64) -> i32 {
    let Some((port, protocol)) = listening(ctx) else { return PASS };
    // Without its slot this one judges, too: a packet is rather counted twice than not judged.
    if let Some(judged) = JUDGED.get_ptr_mut(0) {
        // SAFETY: the slot belongs to this CPU; an interrupt that judges another packet meanwhile makes both judge this one.
        let judged = unsafe { &mut *judged };
        let packet = ctx.skb.skb as u64;
        if judged.packet == packet && judged.by != by {
            judged.packet = 0;
            return PASS;
        }
        (judged.packet, judged.by) = (packet, by);
    }
    let scope = scope(ctx);
    let listener = Listener { scope, port, protocol, in_pods: in_pods(ctx, scope) };
    let decision = decide(&Window { ctx, helper_only: false }, listener, &KernelTables);
    report(ctx, port, &decision);
    match decision.verdict {
        Verdict::Allow => {
            if protocol == UDP && !matches!(decision.reason, Reason::NotGuarded | Reason::Reply) {
                // What the socket answers now makes no reply of the peer's next datagram.
                touch(&decision.flow, Pinhole::SERVED, 0);
            }
            PASS
        }
        Verdict::Deny => DROP,
    }
}
