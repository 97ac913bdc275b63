//! Owns the flood that the bench sends: copies of one SYN, each from another source, sent to an interface at a set pace.
//! Called by `nodeguard-kernel-bench flood` through `BPF_PROG_TEST_RUN` with live frames (Linux 5.18), which sends what the program redirects.
//! Must never be in the object that the daemon loads.

use aya_ebpf::{
    bindings::xdp_action::XDP_DROP,
    helpers::generated::bpf_ktime_get_ns,
    macros::{map, xdp},
    maps::{Array, DevMap},
    programs::XdpContext,
};
use guard_common::abi::Flood;

/// The pace, and the number of packets sent.
#[map]
static FLOOD: Array<Flood> = Array::with_max_entries(1, 0);

/// The interface that they leave by, in any network namespace.
#[map]
static WIRE: DevMap = DevMap::with_max_entries(1, 0);

/// The offsets of identification, the low half of the source address, the source port and the low half of the sequence number in a frame
/// with IPv4 and TCP without options.
const IDENTIFICATION: usize = 18;
const SOURCE: usize = 28;
const SOURCE_PORT: usize = 34;
const SEQUENCE: usize = 40;
/// The number of sources that take turns, and of ports per source.
const SOURCES: u16 = 4096;
const PORTS: u16 = 8192;
/// Packets that leave at once: as many as one test run passes on together, so that the receiver is woken once for all of them.
const BURST: u64 = 64;

/// Sends the frame from the next source if it is due. Both checksums stay valid: what is added to an address is subtracted from another
/// field under the same checksum.
#[xdp]
fn bench_flood(ctx: XdpContext) -> u32 {
    let Some(flood) = FLOOD.get_ptr_mut(0) else { return XDP_DROP };
    // SAFETY: an array slot; one test run at a time uses it.
    let flood = unsafe { &mut *flood };
    // SAFETY: the helper takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    if flood.due > now {
        return XDP_DROP;
    }
    let (number, turn) = (flood.sent as u16 % SOURCES, (flood.sent / u64::from(SOURCES)) as u16 % PORTS);
    flood.sent += 1;
    if flood.sent % BURST == 0 {
        // Packets that could not be sent in time are skipped, not sent later.
        flood.due = (flood.due + BURST * flood.pace).max(now);
    }
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + SEQUENCE + 2 > end {
        return XDP_DROP;
    }
    let frame = start as *mut u8;
    // SAFETY: the fields end before the frame does, which was just checked; they are aligned to two bytes, as the frame is.
    unsafe {
        for (at, value) in [
            (SOURCE, Flood::SOURCE + number),
            (IDENTIFICATION, Flood::SOURCE_PORT - number),
            (SOURCE_PORT, Flood::SOURCE_PORT - number - turn),
            (SEQUENCE, Flood::SEQUENCE + turn),
        ] {
            frame.add(at).cast::<u16>().write(value.to_be());
        }
    }
    WIRE.redirect(0, 0).unwrap_or(XDP_DROP)
}
