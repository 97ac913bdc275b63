//! Owns the clocks of the kernel programs.
//! Called by `maps`, `flows` and `report`.
//! Must never be compared across clocks: each value says which clock it is from.

use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn nanoseconds() -> u64 {
    // SAFETY: the helper takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

/// Seconds of the same clock.
#[inline(always)]
pub(crate) fn seconds() -> u32 {
    (nanoseconds() / 1_000_000_000) as u32
}

/// Nanoseconds of `CLOCK_MONOTONIC_COARSE` (Linux 5.11): cheaper, and exact to a tick of the kernel's timer.
#[inline(always)]
pub(crate) fn coarse_nanoseconds() -> u64 {
    // SAFETY: the helper takes no argument.
    unsafe { bpf_ktime_get_coarse_ns() }
}
