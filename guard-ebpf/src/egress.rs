//! Owns who opens a UDP conversation: cgroup_skb/egress, every packet that a socket below the cgroup is about to send.
//! Called by the kernel in `ip_finish_output`, before fragmentation.
//! Must never drop a packet: it only remembers what the ingress program asks for.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use guard_common::sent_datagram;

use crate::{bytes::Window, flows::touch, maps::KernelTables, socket::SkbSocket};

const PASS: i32 = 1;

/// Remembers the UDP conversations that a guarded socket opens, and those that the node or a caller opens with a guarded port.
#[cgroup_skb(egress)]
fn guard_egress(ctx: SkBuffContext) -> i32 {
    let (socket, window) = (SkbSocket { ctx: &ctx }, Window { ctx: &ctx, helper_only: false });
    sent_datagram(&socket, &window, &KernelTables, |flow, pinhole| touch(flow, pinhole.via, pinhole.cgroup));
    PASS
}
