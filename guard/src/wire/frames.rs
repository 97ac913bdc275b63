//! Owns the messages of the tunnel: `Packet` of the Konnectivity agent protocol, as bytes and as typed frames.
//! Called by `tunnel/stream` (the codec, incoming frames) and by `dial` (outgoing ones).
//! Must never accept a packet whose type and payload disagree: an empty packet would read as a dial.
//!
//! Field numbers: `proto/agent/agent.proto` and `konnectivity-client/proto/client/client.proto` of apiserver-network-proxy v0.36.0. Both
//! declare no package.

use bytes::Bytes;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstDecoder, ProstEncoder};

use crate::wire::counts;

/// The method that carries everything.
pub const METHOD: &str = "/AgentService/Connect";

/// The largest DATA that the agent sends, bytes; a message may have 4 MiB. A server in Go clears a buffer of 1 MiB for every message of more
/// than 32 KiB (`mem.DefaultBufferPool` of grpc-go), which is most of its work if messages are not much larger than that.
pub const MAX_DATA: usize = 256 << 10;

/// A message, as on the wire.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Packet {
    /// One of the `TYPE_` constants. Receivers look at this, not at the payload's case.
    #[prost(int32, tag = "1")]
    pub kind: i32,
    /// The payload.
    #[prost(oneof = "Payload", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub payload: Option<Payload>,
}

/// The payload of a message.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Payload {
    /// With `DIAL_REQ`.
    #[prost(message, tag = "2")]
    DialRequest(DialRequest),
    /// With `DIAL_RSP`.
    #[prost(message, tag = "3")]
    DialResponse(DialResponse),
    /// With `DATA`.
    #[prost(message, tag = "4")]
    Data(Data),
    /// With `CLOSE_REQ`.
    #[prost(message, tag = "5")]
    CloseRequest(CloseRequest),
    /// With `CLOSE_RSP`.
    #[prost(message, tag = "6")]
    CloseResponse(CloseResponse),
    /// With `DIAL_CLS`.
    #[prost(message, tag = "7")]
    CloseDial(CloseDial),
    /// With `DRAIN`.
    #[prost(message, tag = "8")]
    Drain(Drain),
}

/// The control plane asks for a connection.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DialRequest {
    /// Always `tcp` from upstream.
    #[prost(string, tag = "1")]
    pub protocol: String,
    /// `host:port` or `[v6]:port`; the host may be a name.
    #[prost(string, tag = "2")]
    pub address: String,
    /// Names the dial until it has a connection id. May repeat.
    #[prost(int64, tag = "3")]
    pub random: i64,
}

/// The outcome of a dial.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DialResponse {
    /// Empty on success; otherwise it decides the HTTP status.
    #[prost(string, tag = "1")]
    pub error: String,
    /// Chosen by the agent, positive.
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
    /// Of the request.
    #[prost(int64, tag = "3")]
    pub random: i64,
}

/// The control plane closes a connection.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CloseRequest {
    /// Which.
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
}

/// The agent closed a connection.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CloseResponse {
    /// Why, unless it was an ordinary close.
    #[prost(string, tag = "1")]
    pub error: String,
    /// Which.
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
}

/// The control plane no longer waits for a dial.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CloseDial {
    /// Of the dial.
    #[prost(int64, tag = "1")]
    pub random: i64,
}

/// The agent asks for no more dials.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Drain {}

/// Bytes of a connection.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Data {
    /// Which.
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
    /// Never set by upstream.
    #[prost(string, tag = "2")]
    pub error: String,
    /// The bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
}

/// Decodes messages with prost, in buffers that hold a DATA. `bodies` encodes the messages to the server.
#[derive(Clone, Copy, Debug)]
pub struct PacketCodec;

impl Codec for PacketCodec {
    type Encode = Packet;
    type Decode = Packet;
    type Encoder = ProstEncoder<Packet>;
    type Decoder = Counted<ProstDecoder<Packet>>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(0, 0))
    }
    fn decoder(&mut self) -> Self::Decoder {
        Counted(ProstDecoder::new(BufferSettings::new(2 * SERVER_DATA + AROUND, 2 * SERVER_DATA)))
    }
}

/// A decoder that counts the messages.
#[derive(Debug)]
pub struct Counted<T>(T);

impl Decoder for Counted<ProstDecoder<Packet>> {
    type Item = Packet;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Packet>, Status> {
        let packet = self.0.decode(buffer)?;
        if let Some(packet) = &packet {
            counts::received(packet.kind);
        }
        Ok(packet)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

/// The largest DATA that the server sends, bytes.
const SERVER_DATA: usize = 32 << 10;
/// Room for the fields around a DATA and for a short message before it, so that buffers seldom grow.
const AROUND: usize = 1 << 10;

const TYPE_DIAL_REQ: i32 = 0;
const TYPE_DIAL_RSP: i32 = 1;
const TYPE_CLOSE_REQ: i32 = 2;
const TYPE_CLOSE_RSP: i32 = 3;
const TYPE_DATA: i32 = 4;
const TYPE_DIAL_CLS: i32 = 5;
const TYPE_DRAIN: i32 = 6;

/// A message from the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// A dial.
    Dial(DialRequest),
    /// Bytes for a backend.
    Data(Data),
    /// The end of a connection.
    Close(CloseRequest),
    /// The end of a dial.
    CloseDial(CloseDial),
    /// A type that this agent ignores, or a payload of another type.
    Other(i32),
}

impl From<Packet> for Frame {
    fn from(packet: Packet) -> Frame {
        match (packet.kind, packet.payload) {
            (TYPE_DIAL_REQ, Some(Payload::DialRequest(dial))) => Frame::Dial(dial),
            (TYPE_DATA, Some(Payload::Data(data))) => Frame::Data(data),
            (TYPE_CLOSE_REQ, Some(Payload::CloseRequest(close))) => Frame::Close(close),
            (TYPE_DIAL_CLS, Some(Payload::CloseDial(close))) => Frame::CloseDial(close),
            (kind, _) => Frame::Other(kind),
        }
    }
}

/// The dial succeeded.
pub fn dialled(random: i64, connect_id: i64) -> Packet {
    packet(TYPE_DIAL_RSP, Payload::DialResponse(DialResponse { error: String::new(), connect_id, random }))
}

/// The dial failed or was refused.
pub fn dial_failed(random: i64, error: String) -> Packet {
    packet(TYPE_DIAL_RSP, Payload::DialResponse(DialResponse { error, connect_id: 0, random }))
}

/// Bytes from a backend.
pub fn data(connect_id: i64, data: Bytes) -> Packet {
    packet(TYPE_DATA, Payload::Data(Data { connect_id, error: String::new(), data }))
}

/// The end of a connection; `error` is empty for an ordinary close.
pub fn closed(connect_id: i64, error: String) -> Packet {
    packet(TYPE_CLOSE_RSP, Payload::CloseResponse(CloseResponse { error, connect_id }))
}

/// Asks for no more dials.
pub fn drain() -> Packet {
    packet(TYPE_DRAIN, Payload::Drain(Drain {}))
}

fn packet(kind: i32, payload: Payload) -> Packet {
    Packet { kind, payload: Some(payload) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    #[test]
    fn a_dial_has_no_type_bytes_and_an_empty_packet_is_no_dial() {
        // Field 2, length 15: protocol "tcp", address "a:1", random 5 (as the Go server writes it).
        let bytes = b"\x12\x0c\x0a\x03tcp\x12\x03a:1\x18\x05";
        let frame = Frame::from(Packet::decode(&bytes[..]).unwrap());
        assert_eq!(frame, Frame::Dial(DialRequest { protocol: "tcp".into(), address: "a:1".into(), random: 5 }));
        assert_eq!(Frame::from(Packet::decode(&b""[..]).unwrap()), Frame::Other(0));
        let disagreeing =
            Packet { kind: TYPE_DATA, payload: Some(Payload::CloseRequest(CloseRequest { connect_id: 1 })) };
        assert_eq!(Frame::from(disagreeing), Frame::Other(TYPE_DATA));
    }

    #[test]
    fn what_the_agent_sends_has_its_type_and_its_payload() {
        let bytes = data(7, Bytes::from_static(b"x")).encode_to_vec();
        assert_eq!(bytes, b"\x08\x04\x22\x05\x08\x07\x1a\x01x");
        assert_eq!(drain().encode_to_vec(), b"\x08\x06\x42\x00");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(packet) = Packet::decode(&bytes[..]) {
                let _ = Frame::from(packet);
            }
        }
    }
}
