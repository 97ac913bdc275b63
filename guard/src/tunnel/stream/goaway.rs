//! Owns the detection of a GOAWAY among the HTTP/2 frames from the server: the server is about to stop.
//! Called by `establish`, once for each stream; a replacement is then made while this stream goes on.
//! Must never change a byte.
//!
//! HTTP/2 libraries report a GOAWAY only to a caller that opens another stream, and there is none.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

/// Length, type, flags, stream (RFC 9113, section 4.1).
const HEADER: usize = 9;
const GOAWAY: u8 = 7;

/// Finds frames in bytes that come in any pieces.
#[derive(Default)]
struct Scan {
    header: [u8; HEADER],
    have: usize,
    skip: usize,
}

impl Scan {
    /// Whether a GOAWAY begins in these bytes.
    fn feed(&mut self, mut bytes: &[u8]) -> bool {
        let mut found = false;
        while !bytes.is_empty() {
            if self.skip > 0 {
                let count = self.skip.min(bytes.len());
                self.skip -= count;
                bytes = bytes.get(count..).unwrap_or_default();
                continue;
            }
            let count = (HEADER - self.have).min(bytes.len());
            let (taken, rest) = bytes.split_at(count);
            if let Some(into) = self.header.get_mut(self.have..self.have + count) {
                into.copy_from_slice(taken);
            }
            self.have += count;
            bytes = rest;
            if self.have == HEADER {
                let [high, middle, low, kind, ..] = self.header;
                (self.have, self.skip) = (0, usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low));
                found |= kind == GOAWAY;
            }
        }
        found
    }
}

/// A transport that is watched.
pub(crate) struct Watched<S> {
    stream: S,
    scan: Scan,
    going: CancellationToken,
}

impl<S> Watched<S> {
    /// Cancels the token at the first GOAWAY.
    pub(crate) fn new(stream: S, going: CancellationToken) -> Watched<S> {
        Watched { stream, scan: Scan::default(), going }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, into);
        if self.scan.feed(into.filled().get(before..).unwrap_or_default()) {
            self.going.cancel();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let [.., high, middle, low] = (payload.len() as u32).to_be_bytes();
        [[high, middle, low, kind, 0, 0, 0, 0, 1].as_slice(), payload].concat()
    }

    proptest! {
        #[test]
        fn a_goaway_is_found_in_any_pieces_and_only_there(
            frames in prop::collection::vec((0u8..10, prop::collection::vec(Just(GOAWAY), 0..40)), 0..20),
            piece in 1usize..50,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            let mut scan = Scan::default();
            let mut found = false;
            for chunk in bytes.chunks(piece) {
                found |= scan.feed(chunk);
            }
            prop_assert_eq!(found, frames.iter().any(|(kind, _)| *kind == GOAWAY));
        }
    }
}
