//! Owns one stream while it lasts: takes each frame of the server to its dial.
//! Called by `supervisor`, a task for each stream.
//! Must never wait for a dial, the wire or a backend: only for a frame and, within `Patience`, for room in a queue.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use crate::{
    dial::{budget::Patience, queue::Queue, routes::Origin, serve::Dialer},
    sys::error_chain::with_causes,
    tunnel::stream::establish::{Stream, WINDOW},
    wire::{
        counts,
        frames::{CloseRequest, Data, DialRequest, Frame, closed, drain as drain_frame},
    },
};

/// How long late dials are still served after DRAIN was sent: the server may have sent some already.
pub(crate) const LINGER: Duration = Duration::from_millis(500);

/// How long the dials of a lost stream may take to end.
const WIND_UP: Duration = Duration::from_secs(5);

/// How long the server may take to end its half of a stream that we ended.
const GOODBYE: Duration = Duration::from_secs(2);

/// On what terms a stream is served.
pub(crate) struct Terms {
    /// Cancelled to drain: the server is asked for no more dials, and the stream ends when it carries none.
    pub(crate) drain: CancellationToken,
    /// Cancelled when the daemon ends.
    pub(crate) stop: CancellationToken,
    /// The tasks of the stream's dials.
    pub(crate) dials: TaskTracker,
}

/// How a stream ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It was no longer needed and carried nothing.
    Done,
    /// The server closed it.
    Closed,
    /// The server or the network broke it.
    Broken(Box<Status>),
    /// Its task panicked.
    Crashed,
}

impl Ended {
    /// In words, with the causes.
    pub(crate) fn words(&self) -> String {
        match self {
            Ended::Done => "it was no longer needed".to_owned(),
            Ended::Closed => "the server closed it".to_owned(),
            Ended::Broken(status) => with_causes(format!("{} ({})", status.message(), status.code()), status.source()),
            Ended::Crashed => "the session crashed".to_owned(),
        }
    }
}

/// How often a wait for room looks again: other connections may have freed some.
const LOOK: Duration = Duration::from_millis(5);

/// A connection counts as served for this long after a frame.
const SERVED: Duration = Duration::from_secs(1);

/// How many frames for unknown connections are answered in a second.
const REPLIES: u32 = 100;

/// Longer than any address. A longer text is cut here and then refused as malformed.
const LONGEST: usize = 300;

/// Serves a stream until it ends. Returns why it ended.
pub(crate) async fn run(stream: Stream, dialer: Arc<Dialer>, terms: Terms) -> Ended {
    let Stream { mut inbound, outbound, server_id, .. } = stream;
    let Terms { drain, stop, dials } = terms;
    let mut session = Session {
        dialer,
        origin: Origin {
            outbound,
            server_id: server_id.into(),
            lost: CancellationToken::new(),
            routes: Arc::default(),
        },
        dials: dials.clone(),
        patience: Patience::new(Instant::now()),
        traffic: Traffic::default(),
        replies: Replies { left: REPLIES, since: Instant::now() },
    };
    let mut asked_to_drain = false;
    let idle = idle(&drain, &dials);
    tokio::pin!(idle);
    let ended = loop {
        let message = tokio::select! {
            () = stop.cancelled() => break Ended::Done,
            () = &mut idle => break Ended::Done,
            () = drain.cancelled(), if !asked_to_drain => {
                asked_to_drain = true;
                let outbound = session.origin.outbound.clone();
                session.dials.spawn(async move { drop(outbound.send(drain_frame()).await) });
                continue;
            }
            message = inbound.message() => message,
        };
        match message {
            Ok(Some(packet)) => session.take(Frame::from(packet)).await,
            Ok(None) => break Ended::Closed,
            Err(status) => {
                counts::failed(status.code());
                break Ended::Broken(Box::new(status));
            }
        }
    };
    let Session { origin: Origin { lost, outbound, .. }, .. } = session;
    lost.cancel();
    dials.close();
    if timeout(WIND_UP, dials.wait()).await.is_err() {
        tracing::warn!(left = dials.len(), "dials of the lost stream are still ending");
    }
    // The end of our half follows our last message; the server then ends the stream.
    drop(outbound);
    let rest = async { while let Ok(Some(_)) = inbound.message().await {} };
    let _ = timeout(GOODBYE, rest).await;
    ended
}

/// Waits until the stream drains and has carried nothing for a while: the server may have sent a dial before it received DRAIN.
async fn idle(drain: &CancellationToken, dials: &TaskTracker) {
    drain.cancelled().await;
    // A tracker has to be closed to be waited for. Dials may still come.
    dials.close();
    loop {
        dials.wait().await;
        tokio::time::sleep(LINGER).await;
        if dials.is_empty() {
            return;
        }
    }
}

/// A stream that is being served.
struct Session {
    dialer: Arc<Dialer>,
    /// What each of its dials gets.
    origin: Origin,
    dials: TaskTracker,
    patience: Patience,
    traffic: Traffic,
    replies: Replies,
}

impl Session {
    async fn take(&mut self, frame: Frame) {
        match frame {
            Frame::Data(Data { connect_id, data, .. }) => {
                self.traffic.saw(connect_id, Instant::now());
                self.patience.read(data.len(), WINDOW);
                match self.origin.routes.queue(connect_id) {
                    Some(queue) => {
                        if let Err(data) = queue.push(data) {
                            self.hold(&queue, data).await;
                        }
                    }
                    // Late data of a closed connection is ordinary.
                    None => self.reply(connect_id, "unrecognized connectID"),
                }
            }
            Frame::Dial(request) => self.dial(request),
            Frame::Close(CloseRequest { connect_id }) => {
                self.traffic.saw(connect_id, Instant::now());
                match self.origin.routes.remove(connect_id) {
                    Some(queue) => queue.close(),
                    None => self.reply(connect_id, "Unknown connectID"),
                }
            }
            Frame::CloseDial(close) => self.origin.routes.abandon(close.random),
            Frame::Other(kind) => tracing::debug!(kind, "ignored a frame that is not for an agent"),
        }
    }

    /// Waits for room for these bytes while the whole stream waits, which is the last resort. If no patience is left, their connection ends.
    async fn hold(&mut self, queue: &Queue, mut bytes: Bytes) {
        let others = self.traffic.others_served(Instant::now());
        // Asked once: patience grows with time and would never be used up.
        let mut left = self.patience.left(Instant::now(), others);
        while !left.is_zero() {
            let started = Instant::now();
            let _ = timeout(left.min(LOOK), queue.room()).await;
            let held = started.elapsed();
            self.patience.spend(held, others);
            left = left.saturating_sub(held);
            match queue.push(bytes) {
                Ok(()) => return,
                Err(again) => bytes = again,
            }
        }
        queue.end();
    }

    /// Starts a dial in a task of its own, unless it is refused at once.
    fn dial(&mut self, mut request: DialRequest) {
        shorten(&mut request.address);
        shorten(&mut request.protocol);
        if let Some(dial) = Arc::clone(&self.dialer).serve(request, self.origin.clone()) {
            self.dials.spawn(dial);
        }
    }

    /// Tells the server that it used an unknown connection. Limited in rate, and only if the wire has room: it may ask as fast as it likes.
    fn reply(&mut self, id: i64, error: &str) {
        if self.replies.one_more(Instant::now()) {
            drop(self.origin.outbound.try_send(closed(id, error.to_owned())));
        }
    }
}

fn shorten(text: &mut String) {
    if text.len() > LONGEST {
        *text = text.chars().take(LONGEST).collect();
    }
}

/// Which connections are being served.
#[derive(Default)]
struct Traffic {
    /// The connection of the latest frame, and when it came.
    latest: Option<(i64, Instant)>,
    /// When the latest frame of any other connection came.
    others: Option<Instant>,
}

impl Traffic {
    fn saw(&mut self, id: i64, now: Instant) {
        if let Some((latest, at)) = self.latest
            && latest != id
        {
            self.others = Some(at);
        }
        self.latest = Some((id, now));
    }

    /// Whether any connection but that of the latest frame is being served.
    fn others_served(&self, now: Instant) -> bool {
        self.others.is_some_and(|at| now - at < SERVED)
    }
}

/// How many replies are left in this second.
struct Replies {
    left: u32,
    since: Instant,
}

impl Replies {
    fn one_more(&mut self, now: Instant) -> bool {
        if now - self.since >= Duration::from_secs(1) {
            (self.left, self.since) = (REPLIES, now);
        }
        let one = self.left > 0;
        self.left = self.left.saturating_sub(1);
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_served_while_their_frames_come() {
        let (mut traffic, now) = (Traffic::default(), Instant::now());
        traffic.saw(1, now);
        assert!(!traffic.others_served(now));
        traffic.saw(2, now);
        traffic.saw(2, now);
        assert!(traffic.others_served(now));
        traffic.saw(2, now + SERVED);
        assert!(!traffic.others_served(now + SERVED));
    }

    #[test]
    fn only_so_many_replies_a_second() {
        let now = Instant::now();
        let mut replies = Replies { left: REPLIES, since: now };
        let mut count = |now| (0..10_000).filter(|_| replies.one_more(now)).count();
        assert_eq!((count(now), count(now)), (REPLIES as usize, 0));
        assert_eq!(count(now + Duration::from_secs(1)), REPLIES as usize);
    }
}
