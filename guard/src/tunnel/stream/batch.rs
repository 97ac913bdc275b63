//! Owns the buffer between HTTP/2 and TLS that turns a burst of frames into one write and full TLS records.
//! Called by `establish`, once for each stream; the fake server of the tests buffers in the same way.
//! Must never hold back bytes: what is not followed by more is sent at the next poll.
//!
//! h2 flushes after every frame of 16 KiB, which costs two TLS records and a system call each. Here the first flush after a write only
//! wakes the task again; if nothing was written by then, it flushes for real.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The largest buffer, and the limit that rustls gets for one write: each write costs a wake-up of the reader.
pub const GATHERED: usize = 256 << 10;

/// A stream whose small writes are buffered.
pub struct Batched<S> {
    stream: S,
    gathered: BytesMut,
    /// Whether something was written since the last flush.
    written: bool,
}

impl<S: AsyncWrite + Unpin> Batched<S> {
    /// Nothing is buffered yet.
    pub fn new(stream: S) -> Batched<S> {
        Batched { stream, gathered: BytesMut::new(), written: false }
    }

    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let count = ready!(Pin::new(&mut self.stream).poll_write(context, &self.gathered))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Batched<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Batched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.gathered.len() >= GATHERED {
            ready!(self.poll_drain(context))?;
        }
        let count = bytes.len().min(GATHERED - self.gathered.len());
        if self.gathered.capacity() < GATHERED {
            self.gathered.reserve(GATHERED);
        }
        self.gathered.extend_from_slice(bytes.get(..count).unwrap_or_default());
        self.written = true;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.written {
            self.written = false;
            context.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        if self.gathered.is_empty() {
            // Most tunnels are idle most of the time.
            self.gathered = BytesMut::new();
        } else {
            ready!(self.poll_drain(context))?;
        }
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_burst_is_one_write_and_all_of_it_arrives() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut batched = Batched::new(near);
        for round in 0..20u8 {
            batched.write_all(&[round; 16 << 10]).await.unwrap();
            batched.flush().await.unwrap();
            // A flush right after a write waits for what may follow, but never longer than one more poll.
            assert!(batched.gathered.len() <= GATHERED && !batched.gathered.is_empty());
        }
        batched.flush().await.unwrap();
        assert!(batched.gathered.is_empty());
        batched.write_all(b"end").await.unwrap();
        batched.shutdown().await.unwrap();
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), 20 * (16 << 10) + 3);
        assert!(
            got.chunks(16 << 10)
                .take(20)
                .enumerate()
                .all(|(round, chunk)| chunk.iter().all(|byte| usize::from(*byte) == round))
        );
    }

    #[tokio::test]
    async fn a_full_pipe_holds_back_the_writer() {
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let mut batched = Batched::new(near);
        batched.write_all(&[1; GATHERED]).await.unwrap();
        let more = poll_fn(|context| Poll::Ready(Pin::new(&mut batched).poll_write(context, &[2; 5]))).await;
        assert!(more.is_pending());
        let writer = tokio::spawn(async move {
            batched.write_all(&[2; 5]).await.unwrap();
            batched.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        writer.await.unwrap();
        assert_eq!((got.len(), got.last()), (GATHERED + 5, Some(&2)));
    }
}
