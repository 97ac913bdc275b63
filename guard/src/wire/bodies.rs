//! Owns the encoding of messages to the server: gRPC's length before each, and the bytes of a large DATA without a copy.
//! Called by `tunnel/stream/establish`: it is the body of the one request of a stream; hyper polls it while HTTP/2 has room.
//! Must never send other bytes than prost would.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use hyper::body::{Body, Frame};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use tokio::sync::mpsc;
use tonic::Status;

use crate::wire::{
    counts,
    frames::{Data, Packet, Payload},
};

/// Field numbers.
const KIND_IN_PACKET: u32 = 1;
const DATA_IN_PACKET: u32 = 4;
const BYTES_IN_DATA: u32 = 3;

/// A DATA with fewer bytes is copied: its own HTTP/2 frame costs more.
const COPIED: usize = 8 << 10;
/// How many bytes of waiting messages are joined: two HTTP/2 frames.
const TOGETHER: usize = 32 << 10;

/// All messages of a stream, as the body of its request.
pub(crate) struct Messages {
    packets: mpsc::Receiver<Packet>,
    /// The bytes that follow the last piece.
    next: Option<Bytes>,
}

impl Messages {
    /// The messages of this channel, until all senders are gone.
    pub(crate) fn new(packets: mpsc::Receiver<Packet>) -> Messages {
        Messages { packets, next: None }
    }
}

impl Body for Messages {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut piece = BytesMut::new();
        while self.next.is_none() && piece.len() < TOGETHER {
            match self.packets.poll_recv(context) {
                Poll::Ready(Some(packet)) => {
                    counts::sent(packet.kind);
                    self.next = write(packet, &mut piece);
                }
                Poll::Ready(None) if piece.is_empty() => return Poll::Ready(None),
                Poll::Pending if piece.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        let next = if piece.is_empty() { self.next.take() } else { Some(piece.freeze()) };
        Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// Writes a message. The returned bytes follow it directly.
fn write(packet: Packet, piece: &mut BytesMut) -> Option<Bytes> {
    let length = packet.encoded_len();
    // Not compressed, then the length: "Length-Prefixed-Message" of gRPC over HTTP/2.
    piece.put_u8(0);
    piece.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    match packet {
        Packet { kind, payload: Some(Payload::Data(Data { connect_id, error, data })) } if data.len() >= COPIED => {
            // Its bytes are the last field of the DATA, and that is the last one of the message.
            let head = Data { connect_id, error, data: Bytes::new() };
            let around = key_len(BYTES_IN_DATA) + encoded_len_varint(data.len() as u64);
            prost::encoding::int32::encode(KIND_IN_PACKET, &kind, piece);
            encode_key(DATA_IN_PACKET, WireType::LengthDelimited, piece);
            encode_varint((head.encoded_len() + around + data.len()) as u64, piece);
            head.encode_raw(piece);
            encode_key(BYTES_IN_DATA, WireType::LengthDelimited, piece);
            encode_varint(data.len() as u64, piece);
            Some(data)
        }
        packet => {
            packet.encode_raw(piece);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use proptest::prelude::*;

    use super::*;
    use crate::wire::frames::{closed, data, dialled};

    /// The bytes of the body until it would wait, and the number of pieces.
    fn said(packets: &[Packet]) -> (Vec<u8>, usize) {
        let (sender, receiver) = mpsc::channel(packets.len().max(1));
        packets.iter().for_each(|packet| sender.try_send(packet.clone()).unwrap());
        drop(sender);
        let mut messages = Messages::new(receiver);
        let (mut bytes, mut pieces) = (Vec::new(), 0);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        while let Some(frame) = runtime.block_on(poll_fn(|context| Pin::new(&mut messages).poll_frame(context))) {
            bytes.extend_from_slice(&frame.unwrap().into_data().unwrap());
            pieces += 1;
        }
        (bytes, pieces)
    }

    proptest! {
        #[test]
        fn the_bytes_are_those_that_prost_writes(
            packets in prop::collection::vec(
                (any::<i64>(), prop_oneof![Just(0), 1..100usize, COPIED - 1..COPIED + 2, Just(256 << 10)], any::<u8>()),
                0..12,
            )
        ) {
            let packets: Vec<Packet> = packets
                .into_iter()
                .map(|(id, length, byte)| match byte {
                    0..20 => dialled(id, i64::from(byte)),
                    20..40 => closed(id, "e".repeat(length.min(100))),
                    _ => data(id, vec![byte; length].into()),
                })
                .collect();
            let mut expected = Vec::new();
            for packet in &packets {
                expected.put_u8(0);
                expected.put_u32(packet.encoded_len() as u32);
                packet.encode(&mut expected).unwrap();
            }
            prop_assert!(said(&packets).0 == expected);
        }
    }

    #[test]
    fn small_messages_go_together_and_large_bytes_are_not_copied() {
        assert_eq!(said(&[dialled(1, 1), data(1, Bytes::from_static(b"x")), closed(1, String::new())]).1, 1);
        let large = Bytes::from(vec![7; 256 << 10]);
        let (sender, receiver) = mpsc::channel(2);
        sender.try_send(dialled(1, 1)).unwrap();
        sender.try_send(data(1, large.clone())).unwrap();
        let mut messages = Messages::new(receiver);
        let mut piece = || {
            let mut context = Context::from_waker(std::task::Waker::noop());
            let Poll::Ready(frame) = Pin::new(&mut messages).poll_frame(&mut context) else { panic!("nothing") };
            frame.unwrap().unwrap().into_data().unwrap()
        };
        assert!(piece().len() < 100);
        assert_eq!(piece().as_ptr(), large.as_ptr());
    }
}
