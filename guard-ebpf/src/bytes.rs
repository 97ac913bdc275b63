//! Owns reading a packet's bytes in the kernel: direct access where the linear part of the packet covers them, otherwise a helper call.
//! Called by the judgements of guard-common through `PacketBytes`, and by `edge` through `EthernetFrame`.
//! Must never give different bytes by the two ways: a test runs every packet through both.

use aya_ebpf::{
    helpers::generated::bpf_skb_load_bytes,
    programs::{SkBuffContext, TcContext, XdpContext},
};
use guard_common::PacketBytes;

/// The length of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;

/// Header fields are aligned as the kernel aligns headers; without these types the compiler copies byte by byte.
#[repr(C, align(4))]
struct By4<const N: usize>([u8; N]);
#[repr(C, align(2))]
struct By2<const N: usize>([u8; N]);

/// A packet that starts at its IP header.
pub(crate) struct Window<'a> {
    pub(crate) ctx: &'a SkBuffContext,
    /// Never read directly. A constant of each program: the development object tests the helper call alone this way.
    pub(crate) helper_only: bool,
}

impl PacketBytes for Window<'_> {
    #[inline(always)]
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if !self.helper_only {
            // SAFETY: the context is the program's own argument.
            let (data, end) = unsafe { ((*self.ctx.skb.skb).data as usize, (*self.ctx.skb.skb).data_end as usize) };
            let start = data.wrapping_add(offset);
            if start.wrapping_add(N) <= end {
                // SAFETY: the comparison above covers all `N` bytes; the verifier checks that it does.
                return Some(unsafe {
                    if N.is_multiple_of(4) {
                        (*(start as *const By4<N>)).0
                    } else if N.is_multiple_of(2) {
                        (*(start as *const By2<N>)).0
                    } else {
                        *(start as *const [u8; N])
                    }
                });
            }
        }
        let mut bytes = By4([0u8; N]);
        // SAFETY: the destination is `N` bytes of this program's stack.
        let failed = unsafe {
            bpf_skb_load_bytes(self.ctx.skb.skb.cast(), offset as u32, bytes.0.as_mut_ptr().cast(), N as u32)
        };
        if failed == 0 { Some(bytes.0) } else { None }
    }
}

/// A frame that starts at its Ethernet header.
pub(crate) trait EthernetFrame {
    /// The `N` bytes at `offset`.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

/// The packet of a frame, from its IP header on.
pub(crate) struct Carried<'a, F>(pub(crate) &'a F);

impl<F: EthernetFrame> PacketBytes for Carried<'_, F> {
    #[inline(always)]
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.read(ETHERNET + offset)
    }
}

/// A frame before the kernel has made a packet of it.
pub(crate) struct XdpFrame<'a> {
    pub(crate) ctx: &'a XdpContext,
}

impl EthernetFrame for XdpFrame<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        direct(self.ctx.data(), self.ctx.data_end(), offset)
    }
}

/// A frame at the first hook behind the driver.
pub(crate) struct SkbFrame<'a> {
    pub(crate) ctx: &'a TcContext,
    /// Never read directly: the development object tests the helper call alone this way.
    pub(crate) helper_only: bool,
}

impl EthernetFrame for SkbFrame<'_> {
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

/// Reads a frame directly. A frame's headers are aligned to two bytes, because the Ethernet header has 14.
#[inline(always)]
fn direct<const N: usize>(data: usize, end: usize, offset: usize) -> Option<[u8; N]> {
    let start = data.wrapping_add(offset);
    if start.wrapping_add(N) > end {
        return None;
    }
    // SAFETY: the comparison above covers all `N` bytes; the verifier checks that it does.
    Some(unsafe { if N.is_multiple_of(2) { (*(start as *const By2<N>)).0 } else { *(start as *const [u8; N]) } })
}
