//! A message of a proxy-server: its frame has the type that the message states.
#![cfg_attr(not(test), no_main)]

use libfuzzer_sys::fuzz_target;
use nodeguard::wire::frames::{Frame, Packet};
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(packet) = Packet::decode(bytes) {
        let kind = packet.kind;
        let want = match Frame::from(packet) {
            Frame::Dial(_) => 0,
            Frame::Close(_) => 2,
            Frame::Data(_) => 4,
            Frame::CloseDial(_) => 5,
            Frame::Other(other) => other,
        };
        assert_eq!(kind, want);
    }
});
