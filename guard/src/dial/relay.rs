//! Owns the bytes of an open dial, both ways, and its end: a close loses no byte, and a loss is visible.
//! Called by `serve` once the dial is answered; `session` fills the queue that this empties.
//! Must never end a connection whose bytes were dropped with a clean FIN.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::mpsc,
    time::{timeout, timeout_at},
};
use tokio_util::io::poll_read_buf;

use crate::{
    dial::{
        connections::{CloseReason, Ending},
        queue::{Next, Queued},
    },
    wire::frames::{MAX_DATA, Packet, closed, data},
};

/// The size of the read buffer. All connections of a thread share it, because most of them are idle.
const BLOCK: usize = 2 * MAX_DATA;
/// How long the bytes of a closed connection may take to be written, however steadily the backend reads.
const FLUSH: Duration = Duration::from_secs(300);
/// How long a backend may take to close after it got the FIN. Closing our end first would answer its last bytes with a RST.
const LINGER: Duration = Duration::from_secs(5);
/// How long the message that a connection was ended may wait for room on the wire.
const NEWS: Duration = Duration::from_secs(2);

/// What a relay did.
#[derive(Clone, Copy, Debug)]
pub struct Relayed {
    /// Bytes that the backend received.
    pub to_backend: u64,
    /// Bytes that were sent to the control plane.
    pub to_control_plane: u64,
    /// Why it ended.
    pub reason: CloseReason,
}

/// Relays until both sides are done or the dial is ended from outside, then sends CLOSE_RSP to the control plane.
pub async fn relay(
    mut backend: TcpStream,
    queued: Queued,
    id: i64,
    outbound: &mpsc::Sender<Packet>,
    ending: &Ending,
) -> Relayed {
    let sent = AtomicU64::new(0);
    let ended = tokio::select! {
        biased;
        reason = ending.ended() => Err(reason),
        ended = both_ways(&mut backend, &queued, id, outbound, &sent) => ended,
    };
    let relayed =
        |reason| Relayed { to_backend: queued.written(), to_control_plane: sent.load(Ordering::Relaxed), reason };
    let reason = match ended {
        Ok(reason) => return relayed(reason),
        Err(reason) => reason,
    };
    // Bytes may be missing: a RST shows that, a FIN would not.
    queued.discard();
    reset(&backend);
    drop(backend);
    if reason != CloseReason::TunnelLost {
        let _ = timeout(NEWS, outbound.send(closed(id, format!("closed by the guard: {}", reason.name())))).await;
    }
    relayed(reason)
}

/// Relays until the backend is done (what is queued for it is still written) or the control plane is (the backend then gets a FIN). An error
/// is the reason why bytes were dropped.
async fn both_ways(
    backend: &mut TcpStream,
    queued: &Queued,
    id: i64,
    outbound: &mpsc::Sender<Packet>,
    sent: &AtomicU64,
) -> Result<CloseReason, CloseReason> {
    let ((mut read, write), muted) = (backend.split(), AtomicBool::new(false));
    let upload = upload(write, queued);
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
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(CloseReason::Stalled),
                // The backend reads no more but may still send. Bytes for it are dropped.
                Err(_) => {
                    queued.discard();
                    uploading = false;
                }
            },
        }
    };
    let error = if reason == CloseReason::BackendReset { "read: connection reset by peer" } else { "" };
    let _ = outbound.send(closed(id, error.to_owned())).await;
    queued.close();
    muted.store(true, Ordering::Relaxed);
    match reason {
        CloseReason::ControlPlaneClosed => drop(timeout(LINGER, download).await),
        CloseReason::BackendClosed if uploading => match upload.await {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(CloseReason::Stalled),
            Ok(()) | Err(_) => {}
        },
        CloseReason::BackendClosed | CloseReason::BackendReset => {}
        CloseReason::Stalled
        | CloseReason::OverBudget
        | CloseReason::NotTls
        | CloseReason::PolicyChanged
        | CloseReason::TunnelLost
        | CloseReason::Drained => {}
    }
    Ok(reason)
}

/// Writes what is queued until the queue ends, then sends a FIN. A backend that reads nothing for too long is an error.
async fn upload(mut backend: WriteHalf<'_>, queued: &Queued) -> io::Result<()> {
    loop {
        match queued.write(FLUSH, |slices| backend.try_write_vectored(slices))? {
            Next::Wrote => tokio::task::consume_budget().await,
            Next::Blocked(until) => {
                timeout_at(until, backend.writable()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            }
            Next::Empty => queued.more().await,
            Next::Over => break,
        }
    }
    backend.shutdown().await
}

/// Sends what the backend sends, until its end. Bytes are read only when there is room on the wire for them, so a server that does not read
/// makes no memory grow.
async fn download(
    backend: &mut ReadHalf<'_>,
    id: i64,
    outbound: &mpsc::Sender<Packet>,
    sent: &AtomicU64,
    muted: &AtomicBool,
) -> io::Result<()> {
    loop {
        backend.readable().await?;
        let place = if muted.load(Ordering::Relaxed) {
            None
        } else {
            Some(outbound.reserve().await.map_err(|_| io::ErrorKind::BrokenPipe)?)
        };
        // Polled once: if there is nothing to read after all, the reserved room is given back before waiting again.
        let bytes = match poll_fn(|context| Poll::Ready(read(backend, context))).await {
            Poll::Ready(bytes) => bytes?,
            Poll::Pending => continue,
        };
        if bytes.is_empty() {
            return Ok(());
        }
        if let (Some(place), false) = (place, muted.load(Ordering::Relaxed)) {
            sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            place.send(data(id, bytes));
        }
    }
}

/// Bytes of the backend, at most one message; empty at its end.
fn read(backend: &mut ReadHalf<'_>, context: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    thread_local! {
        static BUFFER: RefCell<BytesMut> = RefCell::new(BytesMut::new());
    }
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.capacity() < MAX_DATA {
            buffer.reserve(BLOCK);
        }
        let read = poll_read_buf(Pin::new(backend), context, &mut buffer.limit(MAX_DATA));
        read.map_ok(|count| buffer.split_to(count).freeze())
    })
}

/// Makes the close of this socket a RST.
pub fn reset(backend: &TcpStream) {
    if let Err(error) = socket2::SockRef::from(backend).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot set SO_LINGER");
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        dial::{
            budget::Budget,
            limits::Limits,
            queue::{Queue, queue},
        },
        wire::frames::Payload,
    };

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
    }

    async fn rig() -> Rig {
        let (ours, backend) = pair().await;
        let ending = Ending::default();
        let budget = Budget::new(Limits { stall: Duration::from_millis(500), ..Limits::default() });
        let (queue, queued) = queue(&budget, ending.clone());
        let (sender, outbound) = mpsc::channel(4);
        let end = ending.clone();
        let relayed = tokio::spawn(async move { relay(ours, queued, 7, &sender, &end).await });
        Rig { backend, queue, outbound, relayed }
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
            assert!(queue.push(bytes.clone()).is_ok());
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
        queue.push(Bytes::from_static(b"heard")).unwrap();
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
        let Rig { mut backend, queue, mut outbound, relayed, .. } = rig().await;
        // More than the sockets hold.
        for _ in 0..40 {
            assert!(queue.push(Bytes::from(vec![0; 1 << 20])).is_ok());
        }
        assert_eq!(close_error(outbound.recv().await), "closed by the guard: stalled");
        assert_eq!(relayed.await.unwrap().reason, CloseReason::Stalled);
        // Truncation is a RST: after the bytes that had arrived, an error and no clean end.
        let mut got = Vec::new();
        assert_eq!(backend.read_to_end(&mut got).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
