//! Owns the bytes of an open dial, both ways, and its end: nothing is lost on a close, and what is lost is seen.
//! Called by `dial` once the backend is connected; `session` feeds the queue.
//! Must never end a connection whose bytes were dropped with a clean FIN.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    connections::{CloseReason, Ending},
    tunnel::frame::{MAX_DATA, Packet, closed, data},
};

/// How much may wait for one backend, KiB. The protocol has no flow control of its own for a connection.
const BUDGET: usize = 8 << 10;
/// How much is read from a backend at once.
const READ: usize = 2 * MAX_DATA;
/// How long a backend with a full queue may take without reading a byte.
const STALL: Duration = Duration::from_secs(2);
/// How long the bytes of a closed connection may take to be written.
const FLUSH: Duration = Duration::from_secs(30);
/// How long a backend may take to close after it got the FIN. Closing our end first would answer its last bytes with a RST.
const LINGER: Duration = Duration::from_secs(5);

/// The session's end of a backend's queue.
#[derive(Clone)]
pub struct Queue {
    sender: mpsc::UnboundedSender<Bytes>,
    room: Arc<Semaphore>,
    written: Arc<AtomicU64>,
    closing: CancellationToken,
    ending: Ending,
}

/// The relay's end of a backend's queue.
pub struct Queued {
    receiver: mpsc::UnboundedReceiver<Bytes>,
    room: Arc<Semaphore>,
    written: Arc<AtomicU64>,
    closing: CancellationToken,
}

/// What a relay did.
#[derive(Clone, Copy, Debug)]
pub struct Relayed {
    /// Bytes that the backend got.
    pub to_backend: u64,
    /// Bytes that were sent to the control plane.
    pub to_control_plane: u64,
    /// Why it ended.
    pub reason: CloseReason,
}

/// A queue for one backend.
pub fn queue(ending: Ending) -> (Queue, Queued) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let (room, written, closing) = (Arc::new(Semaphore::new(BUDGET)), Arc::default(), CancellationToken::new());
    let queued = Queued { receiver, room: Arc::clone(&room), written: Arc::clone(&written), closing: closing.clone() };
    (Queue { sender, room, written, closing, ending }, queued)
}

impl Queue {
    /// Queues bytes. Waits while the budget is used up and the backend still reads; a backend that does not is reset, alone.
    pub async fn push(&self, bytes: Bytes) {
        let cost = cost(&bytes);
        loop {
            let before = self.written.load(Ordering::Relaxed);
            match timeout(STALL, self.room.acquire_many(cost)).await {
                Ok(Ok(room)) => {
                    room.forget();
                    // The relay has ended: nobody reads any more.
                    let _ = self.sender.send(bytes);
                    return;
                }
                Ok(Err(_closed)) => return,
                Err(_elapsed) if self.written.load(Ordering::Relaxed) == before => {
                    return self.ending.end(CloseReason::Stalled);
                }
                Err(_elapsed) => {}
            }
        }
    }

    /// The control plane closed: what is queued is written, then the backend gets a FIN.
    pub fn close(self) {
        self.closing.cancel();
    }
}

impl Queued {
    /// The next bytes, whose place in the budget is free again; `None` where the control plane has closed and nothing is left.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        let bytes = tokio::select! {
            biased;
            bytes = self.receiver.recv() => bytes,
            () = self.closing.cancelled() => self.receiver.try_recv().ok(),
        }?;
        self.room.add_permits(cost(&bytes) as usize);
        Some(bytes)
    }

    /// The backend got bytes beside the relay.
    pub(crate) fn wrote(&self, count: usize) {
        self.written.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Waits until the control plane has closed.
    pub(crate) async fn closed(&self) {
        self.closing.cancelled().await;
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.room.close();
    }
}

/// Relays until both sides are done or the dial is ended from outside, and tells the control plane.
pub async fn relay(
    mut backend: TcpStream,
    mut queued: Queued,
    id: i64,
    outbound: &mpsc::Sender<Packet>,
    ending: &Ending,
) -> Relayed {
    let (written, sent, closing) = (Arc::clone(&queued.written), AtomicU64::new(0), queued.closing.clone());
    let overdue = async {
        closing.cancelled().await;
        sleep(FLUSH).await;
    };
    let forced = tokio::select! {
        biased;
        reason = ending.ended() => Some(reason),
        reason = both_ways(&mut backend, &mut queued, id, outbound, &sent) => {
            return Relayed { to_backend: written.load(Ordering::Relaxed), to_control_plane: sent.into_inner(), reason };
        }
        () = overdue => Some(CloseReason::Stalled),
    };
    let reason = forced.unwrap_or(CloseReason::TunnelLost);
    // Bytes may be missing: a RST says so, a FIN would not.
    reset(&backend);
    drop(backend);
    if reason != CloseReason::TunnelLost {
        let _ = timeout(STALL, outbound.send(closed(id, format!("closed by the guard: {}", reason.name())))).await;
    }
    Relayed { to_backend: written.load(Ordering::Relaxed), to_control_plane: sent.into_inner(), reason }
}

/// Until the backend is done (then what is queued for it is still written) or the control plane is (then the backend gets a FIN).
async fn both_ways(
    backend: &mut TcpStream,
    queued: &mut Queued,
    id: i64,
    outbound: &mpsc::Sender<Packet>,
    sent: &AtomicU64,
) -> CloseReason {
    let (mut read, mut write) = backend.split();
    let (finish, muted) = (CancellationToken::new(), AtomicBool::new(false));
    let upload = upload(&mut write, queued, &finish);
    let download = download(&mut read, id, outbound, sent, &muted);
    tokio::pin!(upload, download);
    let mut uploading = true;
    let reason = loop {
        tokio::select! {
            read = &mut download => break match read {
                Ok(()) => CloseReason::BackendClosed,
                Err(_) => CloseReason::BackendReset,
            },
            written = &mut upload, if uploading => match written {
                Ok(()) => break CloseReason::ControlPlaneClosed,
                // The backend reads no more, but may still have something to say.
                Err(_) => uploading = false,
            },
        }
    };
    let error = if reason == CloseReason::BackendReset { "read: connection reset by peer" } else { "" };
    let _ = outbound.send(closed(id, error.to_owned())).await;
    finish.cancel();
    muted.store(true, Ordering::Relaxed);
    match reason {
        CloseReason::ControlPlaneClosed => drop(timeout(LINGER, download).await),
        CloseReason::BackendClosed if uploading => drop(timeout(FLUSH, upload).await),
        CloseReason::BackendClosed | CloseReason::BackendReset => {}
        CloseReason::Stalled | CloseReason::NotTls | CloseReason::PolicyChanged => {}
        CloseReason::TunnelLost | CloseReason::Drained => {}
    }
    reason
}

/// Writes what is queued until the queue ends, then sends a FIN.
async fn upload(backend: &mut WriteHalf<'_>, queued: &mut Queued, finish: &CancellationToken) -> io::Result<()> {
    loop {
        let bytes = tokio::select! {
            biased;
            bytes = queued.receiver.recv() => bytes,
            () = queued.closing.cancelled() => queued.receiver.try_recv().ok(),
            () = finish.cancelled() => queued.receiver.try_recv().ok(),
        };
        let Some(bytes) = bytes else { break };
        let mut rest = bytes.as_ref();
        while !rest.is_empty() {
            let count = match backend.write(rest).await {
                Ok(count) => count,
                Err(error) => {
                    // Nothing more is taken: what comes for this backend is dropped, and nobody waits for it.
                    queued.room.close();
                    queued.receiver.close();
                    return Err(error);
                }
            };
            queued.written.fetch_add(count as u64, Ordering::Relaxed);
            rest = rest.get(count..).unwrap_or_default();
        }
        queued.room.add_permits(cost(&bytes) as usize);
    }
    backend.shutdown().await
}

/// Sends what the backend says, until its end. Memory is taken only when there is something to read: most connections are idle.
async fn download(
    backend: &mut ReadHalf<'_>,
    id: i64,
    outbound: &mpsc::Sender<Packet>,
    sent: &AtomicU64,
    muted: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        backend.readable().await?;
        buffer.reserve(READ);
        match backend.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) if muted.load(Ordering::Relaxed) => buffer.truncate(buffer.len() - count),
            Ok(count) => {
                while !buffer.is_empty() {
                    let bytes = buffer.split_to(buffer.len().min(MAX_DATA)).freeze();
                    if outbound.send(data(id, bytes)).await.is_err() {
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                }
                sent.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if buffer.is_empty() {
                    buffer = BytesMut::new();
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Makes the close of this socket a RST.
pub fn reset(backend: &TcpStream) {
    if let Err(error) = socket2::SockRef::from(backend).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "SO_LINGER");
    }
}

/// What bytes cost of the budget, KiB; even an empty message costs something.
fn cost(bytes: &Bytes) -> u32 {
    (bytes.len().div_ceil(1 << 10)).clamp(1, BUDGET) as u32
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;
    use crate::tunnel::frame::Payload;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (ours, listener.accept().await.unwrap().0)
    }

    struct Rig {
        backend: TcpStream,
        queue: Queue,
        outbound: mpsc::Receiver<Packet>,
        relayed: tokio::task::JoinHandle<Relayed>,
        ending: Ending,
    }

    async fn rig() -> Rig {
        let (ours, backend) = pair().await;
        let ending = Ending::default();
        let (queue, queued) = queue(ending.clone());
        let (sender, outbound) = mpsc::channel(4);
        let end = ending.clone();
        let relayed = tokio::spawn(async move { relay(ours, queued, 7, &sender, &end).await });
        Rig { backend, queue, outbound, relayed, ending }
    }

    fn close_error(packet: Option<Packet>) -> String {
        match packet.unwrap().payload {
            Some(Payload::CloseResponse(close)) => close.error,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_close_right_behind_the_data_loses_none_of_it() {
        let Rig { mut backend, queue, mut outbound, relayed, .. } = rig().await;
        let bytes = Bytes::from(vec![7u8; 1 << 20]);
        for _ in 0..7 {
            queue.push(bytes.clone()).await;
        }
        queue.close();
        let mut got = Vec::new();
        backend.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), 7 << 20);
        assert_eq!(close_error(outbound.recv().await), "");
        drop(backend);
        let relayed = relayed.await.unwrap();
        assert_eq!((relayed.to_backend, relayed.reason), (7 << 20, CloseReason::ControlPlaneClosed));
    }

    #[tokio::test]
    async fn a_backend_that_closes_still_gets_what_was_queued() {
        let Rig { mut backend, queue, mut outbound, relayed, .. } = rig().await;
        backend.write_all(b"last words").await.unwrap();
        backend.shutdown().await.unwrap();
        queue.push(Bytes::from_static(b"heard")).await;
        let mut heard = Vec::new();
        match outbound.recv().await.unwrap().payload {
            Some(Payload::Data(data)) => assert_eq!(data.data, "last words"),
            other => panic!("{other:?}"),
        }
        assert_eq!(close_error(outbound.recv().await), "");
        backend.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"heard");
        assert_eq!(relayed.await.unwrap().reason, CloseReason::BackendClosed);
    }

    #[tokio::test]
    async fn a_backend_that_never_reads_is_reset_and_the_control_plane_told() {
        let Rig { mut backend, queue, mut outbound, relayed, ending } = rig().await;
        let flood = async {
            loop {
                queue.push(Bytes::from(vec![0; 1 << 20])).await;
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = flood => unreachable!("it never ends by itself"),
            reason = ending.ended() => assert_eq!(reason, CloseReason::Stalled),
        }
        assert_eq!(close_error(outbound.recv().await), "closed by the guard: stalled");
        assert_eq!(relayed.await.unwrap().reason, CloseReason::Stalled);
        // Truncation is a RST: after the bytes that had arrived, an error and no clean end.
        let mut got = Vec::new();
        assert_eq!(backend.read_to_end(&mut got).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
