//! Owns one stream while it lasts: frames from the server to dials and their backends.
//! Called by `run`.
//! Must never wait for a dial or for the wire: only for a frame, or for a backend that still reads.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    connect::Stream,
    frame::{CloseRequest, Data, DialRequest, Frame, closed, drain as drain_frame},
    traffic,
};
use crate::{
    dial::{Dialer, Origin},
    drain::LINGER,
    lock::lock,
    relay::Queue,
};

/// How long the dials of a lost stream may take to end.
const WIND_UP: Duration = Duration::from_secs(5);

/// How long the server may take to end a stream that we ended.
const GOODBYE: Duration = Duration::from_secs(2);

/// On what terms a stream is served.
pub(super) struct Terms {
    /// From here on the server is asked for no more dials; the stream ends once it carries none.
    pub(super) drain: CancellationToken,
    /// The daemon ends.
    pub(super) stop: CancellationToken,
    /// The dials of the stream, counted.
    pub(super) dials: TaskTracker,
}

/// How a stream ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// It was not needed any more, and carried nothing.
    Done,
    /// The server or the way to it ended it.
    Broken(String),
}

impl Ended {
    /// In words.
    pub(super) fn words(&self) -> &str {
        match self {
            Ended::Done => "it was not needed any more",
            Ended::Broken(reason) => reason,
        }
    }
}

/// What the frames of one stream refer to.
#[derive(Default)]
struct Routes {
    /// Open dials by connection id.
    open: Mutex<HashMap<i64, Queue>>,
    /// Dials under way by their `random`; it may repeat, and ending one then ends all.
    pending: Mutex<HashMap<i64, Vec<CancellationToken>>>,
}

/// Serves a stream until it ends; says why.
pub(super) async fn run(stream: Stream, dialer: Arc<Dialer>, terms: Terms) -> Ended {
    let Stream { mut inbound, outbound, server_id, .. } = stream;
    let Terms { drain, stop, dials } = terms;
    let (routes, lost) = (Arc::new(Routes::default()), CancellationToken::new());
    let mut asked_to_drain = false;
    let idle = idle(&drain, &dials);
    tokio::pin!(idle);
    let ended = loop {
        let message = tokio::select! {
            () = stop.cancelled() => break Ended::Done,
            () = &mut idle => break Ended::Done,
            () = drain.cancelled(), if !asked_to_drain => {
                asked_to_drain = true;
                let outbound = outbound.clone();
                dials.spawn(async move { drop(outbound.send(drain_frame()).await) });
                continue;
            }
            message = inbound.message() => message,
        };
        match message {
            Ok(Some(packet)) => match Frame::from(packet) {
                Frame::Dial(request) => {
                    let origin = Origin {
                        outbound: outbound.clone(),
                        server_id: server_id.clone(),
                        abandoned: lost.child_token(),
                        lost: lost.clone(),
                        route: Box::new(|_, _| {}),
                    };
                    dial(&dials, &dialer, &routes, request, origin);
                }
                Frame::Data(Data { connect_id, data, .. }) => {
                    let queue = lock(&routes.open).get(&connect_id).cloned();
                    match queue {
                        Some(queue) => queue.push(data).await,
                        // Late data of a closed connection is ordinary. An answer only where the wire has room.
                        None => drop(outbound.try_send(closed(connect_id, "unrecognized connectID".to_owned()))),
                    }
                }
                Frame::Close(CloseRequest { connect_id }) => {
                    let queue = lock(&routes.open).remove(&connect_id);
                    match queue {
                        Some(queue) => queue.close(),
                        None => drop(outbound.try_send(closed(connect_id, "Unknown connectID".to_owned()))),
                    }
                }
                Frame::CloseDial(close) => {
                    for dial in lock(&routes.pending).remove(&close.random).into_iter().flatten() {
                        dial.cancel();
                    }
                }
                Frame::Other(kind) => tracing::debug!(kind, "a frame that is not for an agent"),
            },
            Ok(None) => break Ended::Broken("the server closed it".to_owned()),
            Err(status) => {
                traffic::failed(status.code());
                break Ended::Broken(format!("{} ({})", status.message(), status.code()));
            }
        }
    };
    lost.cancel();
    dials.close();
    if tokio::time::timeout(WIND_UP, dials.wait()).await.is_err() {
        tracing::warn!(left = dials.len(), "dials of the lost stream are still ending");
    }
    // The end of our messages goes out behind all of them; the server then ends the stream.
    drop(outbound);
    let rest = async { while let Ok(Some(_)) = inbound.message().await {} };
    let _ = tokio::time::timeout(GOODBYE, rest).await;
    ended
}

/// Until the stream is asked to drain and has carried nothing for a while: the server may have sent a dial before it heard of it.
async fn idle(drain: &CancellationToken, dials: &TaskTracker) {
    drain.cancelled().await;
    // Closed only to wait for: dials may still come.
    dials.close();
    loop {
        dials.wait().await;
        tokio::time::sleep(LINGER).await;
        if dials.is_empty() {
            return;
        }
    }
}

/// Starts a dial; its routes last as long as it does.
fn dial(dials: &TaskTracker, dialer: &Arc<Dialer>, routes: &Arc<Routes>, request: DialRequest, mut origin: Origin) {
    let random = request.random;
    let abandoned = origin.abandoned.clone();
    lock(&routes.pending).entry(random).or_default().push(abandoned.clone());
    let id = Arc::new(AtomicI64::new(0));
    origin.route = {
        let (routes, id) = (Arc::clone(routes), Arc::clone(&id));
        Box::new(move |connect_id, queue| {
            id.store(connect_id, Ordering::Relaxed);
            lock(&routes.open).insert(connect_id, queue);
        })
    };
    let (dialer, routes) = (Arc::clone(dialer), Arc::clone(routes));
    dials.spawn(async move {
        dialer.serve(request, origin).await;
        // Marks this dial as done for `settled`, wherever it ended.
        abandoned.cancel();
        routes.settled(random);
        lock(&routes.open).remove(&id.load(Ordering::Relaxed));
    });
}

impl Routes {
    /// Forgets the dials of a `random` that are no longer under way.
    fn settled(&self, random: i64) {
        let mut pending = lock(&self.pending);
        if let Some(dials) = pending.get_mut(&random) {
            dials.retain(|dial| !dial.is_cancelled());
            if dials.is_empty() {
                pending.remove(&random);
            }
        }
    }
}
