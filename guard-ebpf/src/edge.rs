//! Owns the edge tier: drops strangers' opening packets to guarded ports of the node on its uplinks, before the stack.
//! Called by the kernel for every packet that an uplink receives: XDP, or tcx ingress where the interface takes no XDP program.
//! Must never be the only guard, and never drop what it does not wholly understand: `ingress` judges whatever passes here.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_F_CURRENT_NETNS, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as TupleV4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as TupleV6,
        tcx_action_base::{TCX_DROP, TCX_NEXT},
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    helpers::generated::{bpf_sk_release, bpf_skb_load_bytes, bpf_skc_lookup_tcp},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use guard_common::{
    Decision, PacketBytes,
    abi::{Address, FlowKey},
    edge,
    packet::{is_mapped, unmapped},
};

use crate::{maps::KernelTables, report::report};

/// The length of an Ethernet header, and the types of what it may carry here. A VLAN tag is another type and passes.
const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// The state of a listener in the kernel's `tcp_states.h`.
const TCP_LISTEN: u32 = 10;

/// Judges a frame before the kernel has made a packet of it.
#[xdp(frags)]
fn guard_edge(ctx: XdpContext) -> u32 {
    if is_dropped(&ctx, &XdpFrame { ctx: &ctx }) { XDP_DROP } else { XDP_PASS }
}

/// The same at the first hook behind the driver.
#[classifier]
fn guard_edge_tc(ctx: TcContext) -> i32 {
    // SAFETY: a plain field of the program's own context: a tag that the driver has taken off.
    let is_tagged = unsafe { (*ctx.skb.skb).vlan_present } != 0;
    if !is_tagged && is_dropped(&ctx, &SkbFrame { ctx: &ctx, helper_only: false }) { TCX_DROP } else { TCX_NEXT }
}

#[inline(always)]
fn is_dropped<C: EbpfContext, F: Frame>(ctx: &C, frame: &F) -> bool {
    judge(frame, |decision| {
        let drops = has_listener(ctx, &decision.flow);
        if drops {
            report(ctx, u16::from_be_bytes(decision.flow.destination_port), decision);
        }
        drops
    })
}

#[inline(always)]
pub(crate) fn judge<F: Frame>(frame: &F, deny: impl FnOnce(&Decision) -> bool) -> bool {
    let Some(kind) = frame.read::<2>(ETHERNET - 2) else { return false };
    let Some([version, _]) = frame.read::<2>(ETHERNET) else { return false };
    let plain = (kind == IPV4 && version >> 4 == 4) || (kind == IPV6 && version >> 4 == 6);
    plain && edge(&Packet(frame), &KernelTables, deny)
}

/// Whether the node has a listener there and no connection. Without one the packet is refused by the stack, or its destination is
/// translated (hostPort, NodePort); with a connection it belongs to that, whoever opened it.
#[inline(always)]
fn has_listener<C: EbpfContext>(ctx: &C, flow: &FlowKey) -> bool {
    let (sport, dport) = (u16::from_ne_bytes(flow.source_port), u16::from_ne_bytes(flow.destination_port));
    // One tuple a family: of a union the compiler would copy what was never written.
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
    // SAFETY: the tuple is this program's, and as long as is said; the socket is checked before it is read, and given back.
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

/// A frame that starts at its Ethernet header.
pub(crate) trait Frame {
    /// The `N` bytes at `offset`.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

/// The frame's packet, from its IP header on.
struct Packet<'a, F>(&'a F);

impl<F: Frame> PacketBytes for Packet<'_, F> {
    #[inline(always)]
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.read(ETHERNET + offset)
    }
}

pub(crate) struct XdpFrame<'a> {
    pub(crate) ctx: &'a XdpContext,
}

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        direct(self.ctx.data(), self.ctx.data_end(), offset)
    }
}

pub(crate) struct SkbFrame<'a> {
    pub(crate) ctx: &'a TcContext,
    /// Never read directly: the development object tests this way on its own.
    pub(crate) helper_only: bool,
}

impl Frame for SkbFrame<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if !self.helper_only
            && let Some(bytes) = direct(self.ctx.data(), self.ctx.data_end(), offset)
        {
            return Some(bytes);
        }
        let mut bytes = [0u8; N];
        // SAFETY: the destination is `N` bytes of this program's stack.
        let failed =
            unsafe { bpf_skb_load_bytes(self.ctx.skb.skb.cast(), offset as u32, bytes.as_mut_ptr().cast(), N as u32) };
        if failed == 0 { Some(bytes) } else { None }
    }
}

#[repr(C, align(2))]
struct By2<const N: usize>([u8; N]);

#[inline(always)]
fn direct<const N: usize>(data: usize, end: usize, offset: usize) -> Option<[u8; N]> {
    let start = data.wrapping_add(offset);
    if start.wrapping_add(N) > end {
        return None;
    }
    // SAFETY: the comparison above covers all `N` bytes; the verifier checks that it does.
    Some(unsafe { if N.is_multiple_of(2) { (*(start as *const By2<N>)).0 } else { *(start as *const [u8; N]) } })
}
