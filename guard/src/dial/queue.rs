//! Owns what waits for one backend: the bytes, their order, and whether more are taken.
//! Called by `session`, which fills it and never waits for it, and by `relay`, which empties it.
//! Must never hold bytes that the budget does not know of, nor give them out of order.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{sync::Notify, time::Instant};

use crate::{
    dial::{
        budget::{Budget, LARGE},
        connections::{CloseReason, Ending},
    },
    sys::lock::lock,
};

/// What a message costs beside its bytes.
const OVERHEAD: usize = 128;
/// A message below this is copied: it would hold the whole buffer that it came in, which has a place for two of the largest.
const COPIED: usize = 24 << 10;
/// How many messages one write takes at most.
const AT_ONCE: usize = 16;
/// A backend that took something within this time is one that reads.
const READS: Duration = Duration::from_millis(100);

/// The queue, from both ends.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There is something to write, or there will be nothing more.
    more: Notify,
    /// Something was written, or nothing more is taken.
    room: Notify,
    budget: Arc<Budget>,
    ending: Ending,
}

struct State {
    chunks: VecDeque<Bytes>,
    cost: usize,
    written: u64,
    phase: Phase,
    /// When the backend last took something, or the first byte began to wait.
    progress: Instant,
    /// Whether the budget knows this as a large one.
    large: bool,
    /// Whether somebody waits for room.
    wanted: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// What is queued is still written, then comes a FIN.
    Closing(Instant),
    /// Nobody writes any more.
    Gone,
}

/// The session's end.
#[derive(Clone)]
pub struct Queue(Arc<Shared>);

/// The relay's end; without it nothing more is taken.
pub struct Queued(Arc<Shared>);

/// What the relay has to do.
pub(crate) enum Next {
    /// Some bytes were written; there may be more.
    Wrote,
    /// The socket has no room. What waits must go out until then.
    Blocked(Instant),
    /// Nothing waits.
    Empty,
    /// Nothing waits, and nothing more will come.
    Over,
}

/// A queue for one backend.
pub fn queue(budget: &Arc<Budget>, ending: Ending) -> (Queue, Queued) {
    let state = State {
        chunks: VecDeque::new(),
        cost: 0,
        written: 0,
        phase: Phase::Open,
        progress: Instant::now(),
        large: false,
        wanted: false,
    };
    let shared = Shared {
        state: Mutex::new(state),
        more: Notify::new(),
        room: Notify::new(),
        budget: Arc::clone(budget),
        ending,
    };
    let shared = Arc::new(shared);
    (Queue(Arc::clone(&shared)), Queued(shared))
}

impl Queue {
    /// Queues bytes. They come back where neither this queue nor all of them together may have more.
    pub fn push(&self, bytes: Bytes) -> Result<(), Bytes> {
        let (queued, reads) = {
            let state = lock(&self.0.state);
            if state.phase != Phase::Open || bytes.is_empty() {
                return Ok(());
            }
            (state.cost, state.reads())
        };
        let cost = bytes.len() + OVERHEAD;
        if !self.0.budget.take(queued, cost, reads) {
            return Err(bytes);
        }
        let bytes = if bytes.len() < COPIED { Bytes::copy_from_slice(&bytes) } else { bytes };
        let mut state = lock(&self.0.state);
        if state.phase != Phase::Open {
            self.0.budget.give(cost);
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
            self.0.budget.enlarged(Arc::downgrade(&self.0));
        }
        self.0.more.notify_one();
        Ok(())
    }

    /// Waits until something was written or nothing more is taken.
    pub(crate) async fn room(&self) {
        lock(&self.0.state).wanted = true;
        self.0.room.notified().await;
    }

    /// There is no room and no time left to wait for it: the connection ends, and what waits is dropped.
    pub(crate) fn end(&self) {
        self.0.end();
    }

    /// The control plane closed: what is queued is written, then the backend gets a FIN.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Queued {
    /// Nothing more is taken; what is queued is still written.
    pub(crate) fn close(&self) {
        self.0.close();
    }

    /// Nothing more is taken, and nothing written.
    pub(crate) fn discard(&self) {
        self.0.gone();
    }

    /// How many bytes the backend got.
    pub(crate) fn written(&self) -> u64 {
        lock(&self.0.state).written
    }

    /// The next bytes, whose place in the budget is free again; none where nothing waits and nothing more will come.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = lock(&self.0.state);
                if let Some(bytes) = state.chunks.pop_front() {
                    let cost = bytes.len() + OVERHEAD;
                    state.cost -= cost;
                    state.progress = Instant::now();
                    self.0.budget.give(cost);
                    return Some(bytes);
                }
                if state.phase != Phase::Open {
                    return None;
                }
            }
            self.more().await;
        }
    }

    /// The backend got bytes beside [`Queued::write`].
    pub(crate) fn wrote(&self, count: usize) {
        lock(&self.0.state).written += count as u64;
    }

    /// Waits until nothing more will come.
    pub(crate) async fn closed(&self) {
        while lock(&self.0.state).phase == Phase::Open {
            self.more().await;
        }
    }

    /// Waits until there may be something to do.
    pub(crate) async fn more(&self) {
        self.0.more.notified().await;
    }

    /// Writes what waits, many messages at once. `flush` is how long all of it may take once nothing more comes.
    pub(crate) fn write(
        &self,
        flush: Duration,
        write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<Next> {
        let mut state = lock(&self.0.state);
        if state.chunks.is_empty() {
            return Ok(if state.phase == Phase::Open { Next::Empty } else { Next::Over });
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
                let deadline = state.progress + self.0.budget.limits().stall;
                return Ok(Next::Blocked(match state.phase {
                    Phase::Closing(since) => deadline.min(since + flush),
                    Phase::Open | Phase::Gone => deadline,
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
        self.0.budget.give(cost);
        if wanted {
            self.0.room.notify_one();
        }
        Ok(Next::Wrote)
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.gone();
    }
}

impl Shared {
    /// Whether the backend reads, and what waits for it; none where nothing more is taken.
    pub(crate) fn size(&self) -> Option<(bool, usize)> {
        let state = lock(&self.state);
        (state.phase != Phase::Gone).then(|| (state.reads(), state.cost))
    }

    /// Ends the connection to have its memory back at once.
    pub(crate) fn end(&self) {
        let reads = lock(&self.state).reads();
        self.ending.end(if reads { CloseReason::OverBudget } else { CloseReason::Stalled });
        self.gone();
    }

    fn close(&self) {
        let mut state = lock(&self.state);
        if state.phase == Phase::Open {
            state.phase = Phase::Closing(Instant::now());
        }
        drop(state);
        self.more.notify_one();
    }

    fn gone(&self) {
        let mut state = lock(&self.state);
        state.phase = Phase::Gone;
        let (chunks, cost) = (std::mem::take(&mut state.chunks), std::mem::take(&mut state.cost));
        drop(state);
        drop(chunks);
        self.budget.give(cost);
        self.room.notify_one();
        self.more.notify_one();
    }
}

impl State {
    fn reads(&self) -> bool {
        self.chunks.is_empty() || self.progress.elapsed() < READS
    }

    /// Takes written bytes out of the queue; returns what they had cost.
    fn advance(&mut self, mut count: usize) -> usize {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dial::limits::Limits;

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
            while queue.0.size().unwrap().1 < kib << 10 {
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
