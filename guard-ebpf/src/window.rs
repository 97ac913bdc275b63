//! Owns reading a packet's bytes in the kernel: direct access where the linear window covers them, a helper call where not.
//! Called by `guard_common::parse`, through `PacketBytes`.
//! Must never answer differently by the two ways: a test runs every packet through both.

use aya_ebpf::{helpers::generated::bpf_skb_load_bytes, programs::SkBuffContext};
use guard_common::PacketBytes;

/// A packet that starts at its IP header.
pub(crate) struct Window<'a> {
    pub(crate) ctx: &'a SkBuffContext,
    /// Never read directly. A constant of each program: the development object tests this way on its own.
    pub(crate) helper_only: bool,
}

/// Header fields are aligned as the kernel aligns headers; without this the compiler would copy byte by byte.
#[repr(C, align(4))]
struct By4<const N: usize>([u8; N]);
#[repr(C, align(2))]
struct By2<const N: usize>([u8; N]);

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
