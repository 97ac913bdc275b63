//! Owns what a datagram that leaves a socket means for guarded UDP ports: cgroup_skb/egress, every packet that a socket below the cgroup is
//! about to send.
//! Called by the kernel in `ip_finish_output`, before fragmentation.
//! Must never drop a packet: it only remembers what the ingress program asks for.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use guard_common::sent_datagram;

use crate::{bytes::Window, flows::KernelConversations, maps::KernelTables, socket::SkbSocket};

const PASS: i32 = 1;

/// Remembers what a guarded socket asks, and the datagrams that the node or a caller sends to a guarded port.
#[cgroup_skb(egress)]
fn guard_egress(ctx: SkBuffContext) -> i32 {
    let window = Window { ctx: &ctx, helper_only: false };
    let conversations = KernelConversations { socket: SkbSocket { ctx: &ctx } };
    sent_datagram(&SkbSocket { ctx: &ctx }, &window, &KernelTables, &conversations);
    PASS
}
