//! Owns how many bytes wait for all backends together, and how many more may wait for one of them.
//! Called by `queue` for every message, and by `session` if there is no room.
//! Must never let all queues together hold more than the memory budget.
//!
//! The protocol has no flow control for a connection: bytes without room are stored, hold up the whole stream, or end their connection. So a
//! queue may always hold the connection budget, and more only while its backend reads and memory is free. If that is used up, the stream is
//! held for as long as [`Patience`] has left. Then the connection ends.

use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    dial::{backlog::Backlog, limits::Limits},
    sys::lock::lock,
};

/// From this many bytes on, a queue may be ended to make room for others.
pub(crate) const LARGE: usize = 1 << 20;

/// The bytes of all queues.
pub struct Budget {
    limits: Limits,
    used: AtomicUsize,
    most: AtomicUsize,
    /// Queues that once held more than [`LARGE`] bytes, and still may.
    large: Mutex<Vec<Weak<Backlog>>>,
}

impl Budget {
    /// Nothing waits.
    pub fn new(limits: Limits) -> Arc<Budget> {
        Arc::new(Budget { limits, used: AtomicUsize::new(0), most: AtomicUsize::new(0), large: Mutex::default() })
    }

    /// The limits that it keeps.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How many bytes wait now, and the most that ever waited.
    pub fn used(&self) -> (usize, usize) {
        (self.used.load(Ordering::Relaxed), self.most.load(Ordering::Relaxed))
    }

    /// Takes room for bytes in a queue that holds `queued`. Returns whether there was room.
    pub(crate) fn take(&self, queued: usize, cost: usize, reads: bool) -> bool {
        let used = || self.used.load(Ordering::Relaxed);
        while used() + cost > self.limits.memory && self.end_the_largest(queued + cost) {}
        let fits = admits(&self.limits, used(), queued, cost, reads);
        if fits {
            let used = self.used.fetch_add(cost, Ordering::Relaxed) + cost;
            self.most.fetch_max(used, Ordering::Relaxed);
        }
        fits
    }

    /// Gives room back.
    pub(crate) fn give(&self, cost: usize) {
        self.used.fetch_sub(cost, Ordering::Relaxed);
    }

    /// A queue became large.
    pub(crate) fn enlarged(&self, queue: &Arc<Backlog>) {
        let queue = Arc::downgrade(queue);
        let mut large = lock(&self.large);
        large.retain(|other| other.strong_count() > 0 && !other.ptr_eq(&queue));
        large.push(queue);
    }

    /// All memory is in use: ends the largest queue if it is larger than the one that needs room. Queues whose backend does not read come
    /// first.
    fn end_the_largest(&self, than: usize) -> bool {
        let large: Vec<Arc<Backlog>> = lock(&self.large).iter().filter_map(Weak::upgrade).collect();
        let sizes = large.iter().filter_map(|queue| queue.size().map(|(reads, bytes)| (!reads, bytes, queue)));
        let largest = sizes.filter(|(_, bytes, _)| *bytes > than).max_by_key(|(stuck, bytes, _)| (*stuck, *bytes));
        largest.is_some_and(|(_, _, queue)| {
            self.give(queue.end());
            true
        })
    }
}

/// Whether a queue of `queued` bytes may take `cost` more while all together hold `used`.
fn admits(limits: &Limits, used: usize, queued: usize, cost: usize, reads: bool) -> bool {
    let free = limits.memory.saturating_sub(used);
    // A backend that does not read most likely never takes these bytes, and they cost the others time on the wire.
    let more = if reads { free } else { 0 };
    cost <= free && queued + cost <= limits.connection.max(more)
}

/// How long one stream may be held up for a connection that has no room: a twentieth of the time while others are served, so that they keep
/// their throughput, and never so long that a new dial, behind what is already on its way, waits for more than a second.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Left while others are served too.
    shared: Duration,
    /// Left in any case.
    alone: Duration,
    refilled: Instant,
}

/// The most that is held at once while others are served.
const SHARED: Duration = Duration::from_millis(150);
/// The share of the time that is held while others are served, one in so many.
const SHARE: u32 = 20;
/// The longest that what is on its way may take because of holds.
const ALONE: Duration = Duration::from_secs(1);

impl Patience {
    /// All of it.
    pub(crate) fn new(now: Instant) -> Patience {
        Patience { shared: SHARED, alone: ALONE, refilled: now }
    }

    /// Bytes were read from a stream that has `window` bytes on its way at most.
    pub(crate) fn read(&mut self, bytes: usize, window: u32) {
        if self.alone < ALONE {
            let refill = ALONE.mul_f64(bytes as f64 / f64::from(window));
            self.alone = (self.alone + refill).min(ALONE);
        }
    }

    /// How long the stream may be held now.
    pub(crate) fn left(&mut self, now: Instant, others: bool) -> Duration {
        self.shared = (self.shared + (now - self.refilled) / SHARE).min(SHARED);
        self.refilled = now;
        if others { self.shared.min(self.alone) } else { self.alone }
    }

    /// Counts a hold.
    pub(crate) fn spend(&mut self, held: Duration, others: bool) {
        self.alone = self.alone.saturating_sub(held);
        if others {
            self.shared = self.shared.saturating_sub(held);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        connection: 8 << 20,
        memory: 256 << 20,
        stall: Duration::ZERO,
        dials: 0,
        dials_per_stream: 0,
        dial: Duration::ZERO,
        connections: 0,
    };

    proptest! {
        #[test]
        fn queues_together_never_hold_more_than_the_memory_budget(
            pushes in prop::collection::vec((0..40usize, 1..(4usize << 20), any::<bool>()), 0..400)
        ) {
            let (mut queues, mut used) = ([0usize; 40], 0);
            for (queue, cost, reads) in pushes {
                if admits(&LIMITS, used, queues[queue], cost, reads) {
                    queues[queue] += cost;
                    used += cost;
                }
                prop_assert!(used <= LIMITS.memory);
            }
        }
    }

    #[test]
    fn one_that_reads_may_have_half_of_the_memory_and_one_that_does_not_its_own_budget() {
        let fill = |reads| {
            let mut queued = 0;
            while admits(&LIMITS, queued, queued, 32 << 10, reads) {
                queued += 32 << 10;
            }
            queued >> 20
        };
        assert_eq!((fill(true), fill(false)), (128, 8));
        // The connection budget is there as long as there is memory at all.
        assert!(admits(&LIMITS, 250 << 20, 5 << 20, 1 << 20, false));
        assert!(!admits(&LIMITS, 250 << 20, 7 << 20, 2 << 20, true));
        assert!(!admits(&LIMITS, 256 << 20, 0, 1, true));
    }

    #[test]
    fn others_are_held_up_for_a_twentieth_of_the_time() {
        let start = Instant::now();
        let (mut patience, mut now, mut held) = (Patience::new(start), start, Duration::ZERO);
        while now - start < Duration::from_secs(60) {
            let wait = patience.left(now, true).min(Duration::from_millis(10));
            now += wait.max(Duration::from_millis(1));
            patience.spend(wait, true);
            patience.read(1 << 20, 4 << 20);
            held += wait;
        }
        assert!(held <= (now - start) / SHARE + SHARED + ALONE / 100, "{held:?}");
        assert!(held >= (now - start) / SHARE / 2, "{held:?}");
    }

    #[test]
    fn one_that_is_alone_is_waited_for_as_long_as_what_is_on_its_way_comes_through() {
        let now = Instant::now();
        let mut patience = Patience::new(now);
        // 8 MiB a second, with 4 MiB on their way: half a second for each 4 MiB.
        for _ in 0..1000 {
            let wait = Duration::from_millis(4);
            assert!(patience.left(now, false) >= wait);
            patience.spend(wait, false);
            patience.read(32 << 10, 4 << 20);
        }
        // 1 MiB a second is too slow: a dial would come through after four.
        let mut frames = 0;
        while patience.left(now, false) > Duration::from_millis(31) {
            patience.spend(Duration::from_millis(31), false);
            patience.read(32 << 10, 4 << 20);
            frames += 1;
        }
        assert!((30..60).contains(&frames), "{frames}");
    }
}
