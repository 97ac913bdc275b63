//! Owns the enforcing hook: cgroup_skb/ingress, every packet that a socket below the cgroup is about to receive.
//! Called by the kernel from `sk_filter_trim_cap`, after DNAT, on loopback too, for every network namespace.
//! Must never touch what is not for a listener: established traffic leaves after one load.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use guard_common::{Listener, Reason, Verdict, abi::Pinhole, decide, packet::UDP};

use crate::{
    egress::touch,
    maps::KernelTables,
    report::report,
    socket::{in_pods, listening, scope},
    window::Window,
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// Judges a packet to a listener: pinhole, then peer, else deny.
#[cgroup_skb(ingress)]
fn guard_ingress(ctx: SkBuffContext) -> i32 {
    let Some((port, protocol)) = listening(&ctx) else { return PASS };
    let scope = scope(&ctx);
    let listener = Listener { scope, port, protocol, in_pods: in_pods(&ctx, scope) };
    let decision = decide(&Window { ctx: &ctx, helper_only: false }, listener, &KernelTables);
    report(&ctx, port, &decision);
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
