//! Owns what the frames of one stream refer to: its open dials by connection id, its pending dials by `random`.
//! Called by `session`, which looks up where a frame goes, and by `serve`, whose guards enter and remove a dial.
//! Must never keep a route or a pending dial after the guard that entered it was dropped.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{dial::queue::Queue, sys::lock::lock, wire::frames::Packet};

/// What a dial needs of the stream that it came on.
#[derive(Clone)]
pub struct Origin {
    /// Where answers and data go.
    pub outbound: mpsc::Sender<Packet>,
    /// The server that asked, for the record.
    pub server_id: Arc<str>,
    /// Cancelled when the stream ends.
    pub lost: CancellationToken,
    /// How the frames of the stream find their dial.
    pub routes: Arc<Routes>,
}

/// The dials of one stream.
#[derive(Default)]
pub struct Routes {
    /// Open dials by connection id.
    open: Mutex<HashMap<i64, Queue>>,
    /// Pending dials by their `random`. It may repeat; abandoning one then abandons all of them.
    pending: Mutex<HashMap<i64, Vec<CancellationToken>>>,
    /// How many dials are pending. An abandoned one counts until its task has ended.
    under_way: AtomicUsize,
}

/// A dial that has no answer yet. Dropping it frees its place.
pub(crate) struct Pending {
    routes: Arc<Routes>,
    random: i64,
    abandoned: CancellationToken,
}

/// The route of an open dial. Dropping it removes the route.
pub(crate) struct Route {
    routes: Arc<Routes>,
    id: i64,
}

impl Origin {
    /// Enters a pending dial; `None` if `limit` dials of this stream are pending already.
    pub(crate) fn pending(&self, random: i64, limit: usize) -> Option<Pending> {
        let routes = Arc::clone(&self.routes);
        let one_more = |count: usize| (count < limit).then_some(count + 1);
        routes.under_way.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        let abandoned = self.lost.child_token();
        lock(&routes.pending).entry(random).or_default().push(abandoned.clone());
        Some(Pending { routes, random, abandoned })
    }

    /// Sends the bytes of a connection to this queue from now on.
    pub(crate) fn route(&self, id: i64, queue: Queue) -> Route {
        lock(&self.routes.open).insert(id, queue);
        Route { routes: Arc::clone(&self.routes), id }
    }
}

impl Routes {
    /// Where the bytes of a connection go; `None` if it is not open.
    pub fn queue(&self, id: i64) -> Option<Queue> {
        lock(&self.open).get(&id).cloned()
    }

    /// Removes the route of a connection that the control plane closes.
    pub fn remove(&self, id: i64) -> Option<Queue> {
        lock(&self.open).remove(&id)
    }

    /// The control plane does not wait for these dials any longer.
    pub fn abandon(&self, random: i64) {
        let dials = lock(&self.pending).remove(&random);
        dials.into_iter().flatten().for_each(|dial| dial.cancel());
    }

    /// How many dials are open and how many are pending.
    pub fn len(&self) -> (usize, usize) {
        (lock(&self.open).len(), self.under_way.load(Ordering::Relaxed))
    }
}

impl Pending {
    /// Cancelled when the control plane gives up waiting or the stream ends.
    pub(crate) fn abandoned(&self) -> CancellationToken {
        self.abandoned.clone()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut pending = lock(&self.routes.pending);
        // Marks this one among those of the same `random`.
        self.abandoned.cancel();
        if let Some(dials) = pending.get_mut(&self.random) {
            dials.retain(|dial| !dial.is_cancelled());
            if dials.is_empty() {
                pending.remove(&self.random);
            }
        }
        drop(pending);
        self.routes.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.routes.remove(self.id);
    }
}
