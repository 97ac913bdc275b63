//! Owns the bytes that wait for one backend: their order, their cost, and whether more are accepted.
//! Called by `queue`, whose two ends fill and empty it, and by `budget`, which ends the largest.
//! Must never give bytes out of order, nor hold any once nobody writes them any more.

use std::{collections::VecDeque, sync::Mutex, time::Duration};

use bytes::{Buf, Bytes};
use tokio::{sync::Notify, time::Instant};

use crate::{
    dial::connections::{CloseReason, Ending},
    sys::lock::lock,
};

/// What a message costs beside its bytes.
pub(crate) const OVERHEAD: usize = 128;
/// A backend that took something within this time is one that reads.
pub(crate) const READS: Duration = Duration::from_millis(100);

/// The bytes that wait for one backend.
pub(crate) struct Backlog {
    pub(crate) state: Mutex<State>,
    /// There is something to write, or there will be nothing more.
    pub(crate) more: Notify,
    /// Something was written, or nothing more is accepted.
    pub(crate) room: Notify,
    ending: Ending,
}

/// What the lock of a backlog protects.
pub(crate) struct State {
    pub(crate) chunks: VecDeque<Bytes>,
    pub(crate) cost: usize,
    pub(crate) written: u64,
    pub(crate) phase: BacklogPhase,
    /// When the backend last took something, or the first byte began to wait.
    pub(crate) progress: Instant,
    /// Whether the budget lists this backlog as a large one.
    pub(crate) large: bool,
    /// Whether somebody waits for room.
    pub(crate) wanted: bool,
}

/// How far a backlog is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum BacklogPhase {
    /// More is accepted.
    Open,
    /// What is queued is still written, then the backend gets a FIN.
    Closing(Instant),
    /// Nobody writes any more.
    Gone,
}

impl Backlog {
    /// Nothing waits.
    pub(crate) fn new(ending: Ending) -> Backlog {
        let state = State {
            chunks: VecDeque::new(),
            cost: 0,
            written: 0,
            phase: BacklogPhase::Open,
            progress: Instant::now(),
            large: false,
            wanted: false,
        };
        Backlog { state: Mutex::new(state), more: Notify::new(), room: Notify::new(), ending }
    }

    /// Whether the backend reads, and what waits for it; `None` if nothing is accepted any more.
    pub(crate) fn size(&self) -> Option<(bool, usize)> {
        let state = lock(&self.state);
        (state.phase != BacklogPhase::Gone).then(|| (state.reads(), state.cost))
    }

    /// Ends the connection to free its memory at once. Returns what that was.
    #[must_use]
    pub(crate) fn end(&self) -> usize {
        let reads = lock(&self.state).reads();
        self.ending.end(if reads { CloseReason::OverBudget } else { CloseReason::Stalled });
        self.discard()
    }

    /// Accepts nothing more; what is queued is still written.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        if state.phase == BacklogPhase::Open {
            state.phase = BacklogPhase::Closing(Instant::now());
        }
        drop(state);
        self.more.notify_one();
    }

    /// Accepts nothing more and drops what waits. Returns what that had cost.
    #[must_use]
    pub(crate) fn discard(&self) -> usize {
        let mut state = lock(&self.state);
        state.phase = BacklogPhase::Gone;
        let (chunks, cost) = (std::mem::take(&mut state.chunks), std::mem::take(&mut state.cost));
        drop(state);
        drop(chunks);
        self.room.notify_one();
        self.more.notify_one();
        cost
    }
}

impl State {
    /// Whether the backend reads.
    pub(crate) fn reads(&self) -> bool {
        self.chunks.is_empty() || self.progress.elapsed() < READS
    }

    /// Takes written bytes out of the backlog; returns what they had cost.
    pub(crate) fn advance(&mut self, mut count: usize) -> usize {
        let mut cost = count;
        while let Some(first) = self.chunks.front_mut() {
            if count < first.len() {
                first.advance(count);
                break;
            }
            count -= first.len();
            cost += OVERHEAD;
            self.chunks.pop_front();
        }
        cost
    }
}
