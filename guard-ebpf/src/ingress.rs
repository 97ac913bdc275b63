//! Owns the enforcing hook: cgroup_skb/ingress, every packet that a socket below the cgroup is about to receive.
//! Called by the kernel from `sk_filter_trim_cap`, after DNAT, on loopback too, in every network namespace.
//! Must never touch a packet that is not for a listener: established traffic leaves after one load.
//!
//! There are two such programs, each with its own link, so that detaching one opens nothing. The second program to see a packet leaves
//! the judgement, its counters and its events to the first.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use guard_common::{Reason, Verdict, abi::Judged, judge_packet, packet::UDP};

use crate::{
    bytes::Window,
    flows::KernelConversations,
    maps::{JUDGED, KernelTables},
    report::report,
    socket::{SkbSocket, listening},
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// Judges a packet to a listener: pinhole, then peer, otherwise deny.
#[cgroup_skb(ingress)]
fn guard_ingress(ctx: SkBuffContext) -> i32 {
    judge(&ctx, Judged::FIRST)
}

/// The same, for when the other program is gone.
#[cgroup_skb(ingress)]
fn guard_ingress_too(ctx: SkBuffContext) -> i32 {
    judge(&ctx, Judged::SECOND)
}

#[inline(always)]
fn judge(ctx: &SkBuffContext, by: u64) -> i32 {
    let Some((port, protocol)) = listening(ctx) else { return PASS };
    if was_judged(ctx, by) {
        return PASS;
    }
    let decision = judge_packet(&SkbSocket { ctx }, port, protocol, &Window { ctx, helper_only: false }, &KernelTables);
    report(ctx, port, &decision);
    match decision.verdict {
        Verdict::Allow => {
            if protocol == UDP && !matches!(decision.reason, Reason::NotGuarded | Reason::Reply) {
                // The socket's answer does not make the peer's next datagram a reply.
                KernelConversations { socket: SkbSocket { ctx } }.heard(&decision.flow);
            }
            PASS
        }
        Verdict::Deny => DROP,
    }
}

/// Whether the other program judged this packet. Without the slot both judge: a packet is counted twice rather than not judged.
#[inline(always)]
fn was_judged(ctx: &SkBuffContext, by: u64) -> bool {
    let Some(judged) = JUDGED.get_ptr_mut(0) else { return false };
    // SAFETY: the slot belongs to this CPU; if an interrupt judges another packet in between, both programs judge this one.
    let judged = unsafe { &mut *judged };
    let packet = ctx.skb.skb as u64;
    if judged.packet == packet && judged.by != by {
        judged.packet = 0;
        return true;
    }
    (judged.packet, judged.by) = (packet, by);
    false
}
