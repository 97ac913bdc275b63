//! Owns the two ends of what waits for one backend: one takes bytes in, the other writes them.
//! Called by `session`, which fills it and never waits for it, and by `relay`, which empties it.
//! Must never hold bytes that the budget does not count.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    dial::{
        backlog::{Backlog, BacklogPhase, OVERHEAD},
        budget::{Budget, LARGE},
        connections::Ending,
    },
    sys::lock::lock,
};

/// A message below this size is copied: it would keep the whole buffer that it came in, which has room for two of the largest.
const COPIED: usize = 24 << 10;
/// How many messages one write takes at most.
const AT_ONCE: usize = 16;

/// The session's end.
#[derive(Clone)]
pub struct Queue {
    backlog: Arc<Backlog>,
    budget: Arc<Budget>,
}

/// The relay's end. Once it is dropped nothing more is accepted.
pub struct Queued {
    backlog: Arc<Backlog>,
    budget: Arc<Budget>,
}

/// What the relay has to do.
pub(crate) enum Next {
    /// Some bytes were written; there may be more.
    Wrote,
    /// The socket has no room. What waits must be written by then.
    Blocked(Instant),
    /// Nothing waits.
    Empty,
    /// Nothing waits, and nothing more will come.
    Over,
}

/// A queue for one backend.
pub fn queue(budget: &Arc<Budget>, ending: Ending) -> (Queue, Queued) {
    let (backlog, budget) = (Arc::new(Backlog::new(ending)), Arc::clone(budget));
    (Queue { backlog: Arc::clone(&backlog), budget: Arc::clone(&budget) }, Queued { backlog, budget })
}

impl Queue {
    /// Queues bytes. They come back if this queue, or all queues together, may not hold more.
    pub fn push(&self, bytes: Bytes) -> Result<(), Bytes> {
        let (queued, reads) = {
            let state = lock(&self.backlog.state);
            if state.phase != BacklogPhase::Open || bytes.is_empty() {
                return Ok(());
            }
            (state.cost, state.reads())
        };
        let cost = bytes.len() + OVERHEAD;
        if !self.budget.take(queued, cost, reads) {
            return Err(bytes);
        }
        let bytes = if bytes.len() < COPIED { Bytes::copy_from_slice(&bytes) } else { bytes };
        let mut state = lock(&self.backlog.state);
        if state.phase != BacklogPhase::Open {
            self.budget.give(cost);
            return Ok(());
        }
        if state.chunks.is_empty() {
            state.progress = Instant::now();
        }
        state.chunks.push_back(bytes);
        state.cost += cost;
        let enlarged = !state.large && state.cost > LARGE;
        state.large |= enlarged;
        drop(state);
        if enlarged {
            self.budget.enlarged(&self.backlog);
        }
        self.backlog.more.notify_one();
        Ok(())
    }

    /// Waits until something was written or nothing more is accepted.
    pub(crate) async fn room(&self) {
        lock(&self.backlog.state).wanted = true;
        self.backlog.room.notified().await;
    }

    /// There is no room and no time left to wait for it: the connection ends, and what waits is dropped.
    pub(crate) fn end(&self) {
        self.budget.give(self.backlog.end());
    }

    /// The control plane closed: what is queued is written, then the backend gets a FIN.
    pub fn close(&self) {
        self.backlog.close();
    }
}

impl Queued {
    /// Accepts nothing more; what is queued is still written.
    pub(crate) fn close(&self) {
        self.backlog.close();
    }

    /// Accepts nothing more, and drops what waits.
    pub(crate) fn discard(&self) {
        self.budget.give(self.backlog.discard());
    }

    /// How many bytes the backend received.
    pub(crate) fn written(&self) -> u64 {
        lock(&self.backlog.state).written
    }

    /// The next bytes, which the budget no longer counts; `None` if nothing waits and nothing more will come.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = lock(&self.backlog.state);
                if let Some(bytes) = state.chunks.pop_front() {
                    let cost = bytes.len() + OVERHEAD;
                    state.cost -= cost;
                    state.progress = Instant::now();
                    self.budget.give(cost);
                    return Some(bytes);
                }
                if state.phase != BacklogPhase::Open {
                    return None;
                }
            }
            self.more().await;
        }
    }

    /// Counts bytes that the backend received in another way than [`Queued::write`].
    pub(crate) fn wrote(&self, count: usize) {
        lock(&self.backlog.state).written += count as u64;
    }

    /// Waits until nothing more will come.
    pub(crate) async fn closed(&self) {
        while lock(&self.backlog.state).phase == BacklogPhase::Open {
            self.more().await;
        }
    }

    /// Waits until there may be something to do.
    pub(crate) async fn more(&self) {
        self.backlog.more.notified().await;
    }

    /// Writes what waits, many messages at once. `flush` limits how long all of it may take once nothing more comes.
    pub(crate) fn write(
        &self,
        flush: Duration,
        write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<Next> {
        let mut state = lock(&self.backlog.state);
        if state.chunks.is_empty() {
            return Ok(if state.phase == BacklogPhase::Open { Next::Empty } else { Next::Over });
        }
        let mut slices = [IoSlice::new(&[]); AT_ONCE];
        let mut used = 0;
        for (slice, chunk) in slices.iter_mut().zip(&state.chunks) {
            *slice = IoSlice::new(chunk);
            used += 1;
        }
        let count = match write(slices.get(..used).unwrap_or_default()) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let deadline = state.progress + self.budget.limits().stall;
                return Ok(Next::Blocked(match state.phase {
                    BacklogPhase::Closing(since) => deadline.min(since + flush),
                    BacklogPhase::Open | BacklogPhase::Gone => deadline,
                }));
            }
            Err(error) => return Err(error),
        };
        state.progress = Instant::now();
        state.written += count as u64;
        let cost = state.advance(count);
        state.cost -= cost;
        let wanted = std::mem::take(&mut state.wanted);
        if state.chunks.is_empty() {
            state.chunks = VecDeque::new();
        }
        drop(state);
        self.budget.give(cost);
        if wanted {
            self.backlog.room.notify_one();
        }
        Ok(Next::Wrote)
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.budget.give(self.backlog.discard());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dial::{backlog::READS, connections::CloseReason, limits::Limits};

    fn small() -> Arc<Budget> {
        Budget::new(Limits { connection: 2 << 20, memory: 4 << 20, stall: STALL, ..Limits::default() })
    }

    const STALL: Duration = Duration::from_secs(2);

    /// Writes that much.
    fn drain(queued: &Queued, most: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < most {
            let next = queued.write(STALL, |slices| {
                let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                let count = all.len().min(most - got.len());
                got.extend_from_slice(&all[..count]);
                Ok(count)
            });
            if !matches!(next, Ok(Next::Wrote)) {
                break;
            }
        }
        got
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in_and_the_budget_is_whole_again(
            sizes in prop::collection::vec(0..60_000usize, 0..30), pieces in prop::collection::vec(1..90_000usize, 1..20)
        ) {
            let budget = small();
            let (queue, queued) = queue(&budget, Ending::default());
            let (mut sent, mut got) = (Vec::new(), Vec::new());
            let mut pieces = pieces.iter().cycle();
            for (number, size) in sizes.iter().enumerate() {
                let bytes = vec![number as u8; *size];
                if queue.push(Bytes::from(bytes.clone())).is_ok() {
                    sent.extend_from_slice(&bytes);
                }
                if number % 3 == 0 {
                    got.extend(drain(&queued, *pieces.next().unwrap()));
                }
            }
            queue.close();
            prop_assert!(queue.push(Bytes::from_static(b"late")).is_ok());
            got.extend(drain(&queued, usize::MAX));
            prop_assert!(matches!(queued.write(STALL, |_| Ok(0)), Ok(Next::Over)));
            prop_assert_eq!(budget.used().0, 0);
            prop_assert_eq!(queued.written(), sent.len() as u64);
            prop_assert!(sent == got);
        }
    }

    #[test]
    fn when_all_memory_is_used_the_largest_that_does_not_read_makes_room() {
        let budget = small();
        let open = |_| {
            let ending = Ending::default();
            (queue(&budget, ending.clone()), ending)
        };
        let chunk = || Bytes::from(vec![0; 32 << 10]);
        // The second has the most; together they leave little.
        let all: Vec<_> = (0..3).map(open).collect();
        for (((queue, _), _), kib) in all.iter().zip([1100, 1500, 1100]) {
            while queue.backlog.size().unwrap().1 < kib << 10 {
                assert!(queue.push(chunk()).is_ok());
            }
        }
        std::thread::sleep(2 * READS);
        let ((little, queued), ending) = open(0);
        for _ in 0..20 {
            assert!(little.push(chunk()).is_ok());
        }
        let ended: Vec<_> = all.iter().map(|(_, ending)| ending.reason()).collect();
        assert_eq!((ended, ending.reason()), (vec![None, Some(CloseReason::Stalled), None], None));
        assert!(budget.used().1 <= 4 << 20);
        drop((all, queued));
        assert_eq!(budget.used().0, 0);
    }

    #[test]
    fn a_blocked_queue_says_until_when() {
        let (queue, queued) = queue(&small(), Ending::default());
        queue.push(Bytes::from_static(b"x")).unwrap();
        let start = Instant::now();
        let about = |time: Duration, want: Duration| time.abs_diff(want) < READS;
        let blocked = || match queued.write(STALL / 4, |_| Err(io::ErrorKind::WouldBlock.into())) {
            Ok(Next::Blocked(until)) => until.saturating_duration_since(start),
            _ => panic!("not blocked"),
        };
        assert!(about(blocked(), STALL));
        queue.close();
        assert!(about(blocked(), STALL / 4));
    }
}
