//! Owns the edge hook: drops strangers' opening packets to guarded ports of the node on its uplinks, before the network stack.
//! Called by the kernel for every packet that an uplink receives: XDP, or tcx ingress if the interface supports no XDP program.
//! Must never be the only guard, and never drop a packet that it does not fully understand: `ingress` judges whatever passes here.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_F_CURRENT_NETNS, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as TupleV4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as TupleV6,
        tcx_action_base::{TCX_DROP, TCX_NEXT},
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use guard_common::{
    Decision,
    abi::{Address, FlowKey},
    drops_stranger,
    packet::{is_mapped, unmapped},
};

use crate::{
    bytes::{Carried, ETHERNET, EthernetFrame, SkbFrame, XdpFrame},
    maps::KernelTables,
    report::report,
};

/// The types of Ethernet frame that are judged. A VLAN tag is another type, and passes.
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// The state of a listener, from the kernel's `tcp_states.h`.
const TCP_LISTEN: u32 = 10;

/// Judges a frame before the kernel has made a packet of it.
#[xdp(frags)]
fn guard_edge(ctx: XdpContext) -> u32 {
    if is_dropped(&ctx, &XdpFrame { ctx: &ctx }) { XDP_DROP } else { XDP_PASS }
}

/// The same at the first hook behind the driver.
#[classifier]
fn guard_edge_tc(ctx: TcContext) -> i32 {
    // SAFETY: a plain field of the program's own context: a tag that the driver has removed from the frame.
    let is_tagged = unsafe { (*ctx.skb.skb).vlan_present } != 0;
    if !is_tagged && is_dropped(&ctx, &SkbFrame { ctx: &ctx, helper_only: false }) { TCX_DROP } else { TCX_NEXT }
}

#[inline(always)]
fn is_dropped<C: EbpfContext, F: EthernetFrame>(ctx: &C, frame: &F) -> bool {
    judge(frame, |decision| {
        let drops = has_listener(ctx, &decision.flow);
        if drops {
            report(ctx, u16::from_be_bytes(decision.flow.destination_port), decision);
        }
        drops
    })
}

/// Judges a frame that carries an IP packet directly; `deny` as in [`drops_stranger`].
#[inline(always)]
pub(crate) fn judge<F: EthernetFrame>(frame: &F, deny: impl FnOnce(&Decision) -> bool) -> bool {
    let Some(kind) = frame.read::<2>(ETHERNET - 2) else { return false };
    let Some([version, _]) = frame.read::<2>(ETHERNET) else { return false };
    let plain = (kind == IPV4 && version >> 4 == 4) || (kind == IPV6 && version >> 4 == 6);
    plain && drops_stranger(&Carried(frame), &KernelTables, deny)
}

/// Whether the node has a listener for this flow and no connection. Without a listener the stack refuses the packet or translates its
/// destination (hostPort, NodePort); with a connection the packet belongs to that, whoever opened it.
#[inline(always)]
fn has_listener<C: EbpfContext>(ctx: &C, flow: &FlowKey) -> bool {
    let (sport, dport) = (u16::from_ne_bytes(flow.source_port), u16::from_ne_bytes(flow.destination_port));
    // One tuple per family: of a union the compiler would copy bytes that were never written.
    if is_mapped(&flow.source) {
        let saddr = u32::from_ne_bytes(unmapped(&flow.source));
        let daddr = u32::from_ne_bytes(unmapped(&flow.destination));
        listens(ctx, TupleV4 { saddr, daddr, sport, dport })
    } else {
        listens(ctx, TupleV6 { saddr: words(&flow.source), daddr: words(&flow.destination), sport, dport })
    }
}

#[inline(always)]
fn listens<C: EbpfContext, T>(ctx: &C, mut tuple: T) -> bool {
    let tuple: *mut T = &raw mut tuple;
    // SAFETY: the tuple is this program's, and its size is given; the socket is checked before it is read, and released.
    unsafe {
        let size = size_of::<T>() as u32;
        let socket =
            bpf_skc_lookup_tcp(ctx.as_ptr(), tuple.cast::<bpf_sock_tuple>(), size, BPF_F_CURRENT_NETNS as u64, 0);
        if socket.is_null() {
            return false;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        state == TCP_LISTEN
    }
}

#[inline(always)]
fn words(a: &Address) -> [u32; 4] {
    let word = |at: usize| u32::from_ne_bytes([a[at], a[at + 1], a[at + 2], a[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}
