//! Owns the writes of pinholes and UDP conversations.
//! Called by `sockops` for TCP connections, by `egress` and `ingress` for datagrams.
//! Must never judge: whether a flow may be entered is decided by `guard_common::openings`, and what it admits by `decide`.

use guard_common::abi::{FlowKey, HealthCounter, Pinhole, UDP_FLOW_SECONDS, opener_slot};

use crate::{
    clock::seconds,
    maps::{OPENERS, PINHOLES, UDP_FLOWS},
    report::lost,
};

/// Opens the pinhole of a TCP flow. A pinhole that does not fit is counted, and its connection is denied.
#[inline(always)]
pub(crate) fn open(flow: &FlowKey, pinhole: Pinhole) -> bool {
    let opener = opener_slot(&flow.source);
    // The mark first: `decide` looks for a pinhole only if its source has one.
    if OPENERS.set(opener, 1, 0).is_err() || PINHOLES.insert(flow, pinhole, 0).is_err() {
        lost(HealthCounter::PinholesLost);
        return false;
    }
    true
}

/// Closes the pinhole of a TCP flow. Most sockets never had one.
#[inline(always)]
pub(crate) fn close(flow: &FlowKey) {
    let _ = PINHOLES.remove(flow);
}

/// Enters a UDP conversation, or notes that it continues. The opener of a conversation that has not expired stays its opener.
#[inline(always)]
pub(crate) fn touch(flow: &FlowKey, via: u32, cgroup: u64) {
    let now = seconds();
    if let Some(known) = UDP_FLOWS.get_ptr_mut(flow) {
        // SAFETY: an element of the table; a lost race costs a second's precision of `at`.
        let known = unsafe { &mut *known };
        if now.wrapping_sub(known.at) <= UDP_FLOW_SECONDS {
            if known.via == via {
                known.at = now;
            }
            return;
        }
    }
    if UDP_FLOWS.insert(flow, Pinhole { via, at: now, cgroup }, 0).is_err() {
        lost(HealthCounter::PinholesLost);
    }
}
