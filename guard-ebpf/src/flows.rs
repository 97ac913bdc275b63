//! Owns the writes of what sockets of this node open: pinholes, what a UDP socket asked, datagrams on their way.
//! Called by `sockops` for TCP connections, by `egress` and `ingress` for datagrams.
//! Must never judge: what may be entered is decided by `guard_common::openings`, and what it admits by `decide`.

use guard_common::{
    Conversations, Namespace,
    abi::{Asked, AskedKey, FlowKey, HealthCounter, Pinhole, SentDatagram, Spoken, opener_slot},
};

use crate::{
    clock::{nanoseconds, seconds},
    maps::{ASKED, ASKED_BY_PODS, OPENED, OPENERS, PINHOLES, SENT},
    report::lost,
    socket::{SkbSocket, spoken},
};

/// Opens the pinhole of a TCP flow: of the daemon's own socket, or of somebody else's. A pinhole that does not fit is counted, and its
/// connection is denied.
#[inline(always)]
pub(crate) fn open(flow: &FlowKey, pinhole: Pinhole, own: bool) -> bool {
    // The mark first: `decide` looks for a pinhole only if its source has one.
    let marked = OPENERS.set(opener_slot(&flow.source), 1, 0).is_ok();
    let opened = if own { PINHOLES.insert(flow, pinhole, 0) } else { OPENED.insert(flow, pinhole, 0) };
    let done = marked && opened.is_ok();
    if !done {
        lost(HealthCounter::PinholesLost);
    }
    done
}

/// Closes the pinhole of a TCP flow. Most sockets never had one.
#[inline(always)]
pub(crate) fn close(flow: &FlowKey) {
    let _ = PINHOLES.remove(flow);
    let _ = OPENED.remove(flow);
}

/// The memory of the UDP sockets. `socket` is the one that sends or receives.
pub(crate) struct KernelConversations<'a> {
    pub(crate) socket: SkbSocket<'a>,
}

impl KernelConversations<'_> {
    /// Notes that a remote side spoke to this socket and was admitted. If there is no room for the note, an answer that the socket sends
    /// later finds none either and makes no reply.
    #[inline(always)]
    pub(crate) fn heard(&self, flow: &FlowKey) {
        let Some(spoken) = spoken(self.socket.ctx) else { return lost(HealthCounter::PinholesLost) };
        if let Some(window) = spoken.windows.get_mut(Spoken::slot(&flow.source, flow.source_port)) {
            *window = Spoken::window(seconds());
        }
    }
}

impl Conversations for KernelConversations<'_> {
    #[inline(always)]
    fn asks(&self, namespace: Namespace, key: &AskedKey) {
        let now = seconds();
        let Some(spoken) = spoken(self.socket.ctx) else { return lost(HealthCounter::PinholesLost) };
        let Some(window) = spoken.windows.get(Spoken::slot(&key.address, key.port)) else { return };
        let table = if matches!(namespace, Namespace::Node) { &ASKED } else { &ASKED_BY_PODS };
        // Whoever spoke first is answered and not asked, unless the socket asked before: then the conversation goes on.
        // SAFETY: only whether there is an entry is looked at.
        if Spoken::counts(*window, now) && unsafe { table.get(key) }.is_none() {
            return;
        }
        if table.insert(key, Asked { at: now }, 0).is_err() {
            lost(HealthCounter::PinholesLost);
        }
    }

    #[inline(always)]
    fn sends(&self, flow: &FlowKey, datagram: SentDatagram) {
        if SENT.insert(flow, SentDatagram { at_ns: nanoseconds(), ..datagram }, 0).is_err() {
            lost(HealthCounter::PinholesLost);
        }
    }

    #[inline(always)]
    fn takes_over(&self, flow: &FlowKey, netns: u64) {
        // SAFETY: the value is read at once.
        if unsafe { SENT.get(flow) }.is_some_and(|sent| sent.netns == netns) {
            let _ = SENT.remove(flow);
        }
    }
}
