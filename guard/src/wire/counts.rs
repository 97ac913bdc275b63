//! Owns the counters of messages and errors of all streams, as upstream counts them.
//! Called by `frames` and `bodies` for each message, and by `tunnel/stream/session` for a stream that ends with an error; the tunnel's state reads them.
//! Must never keep more of a message than its type.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicU64, Ordering},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tonic::Code;

/// The message types by number.
pub const TYPES: [&str; 7] = ["DIAL_REQ", "DIAL_RSP", "CLOSE_REQ", "CLOSE_RSP", "DATA", "DIAL_CLS", "DRAIN"];

/// The status codes of gRPC by number, as Go writes them.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// The last counter is for messages of an unknown type.
type Counts = [AtomicU64; TYPES.len() + 1];

/// There is one tunnel in a process.
static SENT: Counts = [const { AtomicU64::new(0) }; TYPES.len() + 1];
static RECEIVED: Counts = [const { AtomicU64::new(0) }; TYPES.len() + 1];
static ERRORS: [AtomicU64; CODES.len()] = [const { AtomicU64::new(0) }; CODES.len()];

/// A message goes to the server.
pub(crate) fn sent(kind: i32) {
    count(&SENT, kind);
}

/// A message came from the server.
pub(crate) fn received(kind: i32) {
    count(&RECEIVED, kind);
}

/// A stream ended with an error.
pub fn failed(code: Code) {
    if let Some(counter) = ERRORS.get(code as usize) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn count(counts: &Counts, kind: i32) {
    let index = usize::try_from(kind).unwrap_or(TYPES.len()).min(TYPES.len());
    if let Some(counter) = counts.get(index) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Messages and errors of all streams. What counts nothing is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StreamCounts {
    /// Messages, by direction and type.
    pub packets: Vec<MessageCount>,
    /// Streams that ended with an error, by gRPC status code.
    pub errors: Vec<ErrorCount>,
}

/// Messages of one type in one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MessageCount {
    /// `from_agent` or `to_agent`.
    pub segment: Cow<'static, str>,
    /// The type's name, or `UNKNOWN`.
    pub packet_type: Cow<'static, str>,
    /// How many.
    pub count: u64,
}

/// Streams that ended with one error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorCount {
    /// The gRPC status code, as Go writes it.
    pub code: Cow<'static, str>,
    /// How many.
    pub count: u64,
}

/// The counts so far.
pub fn counted() -> StreamCounts {
    let value = |counter: &AtomicU64| Some(counter.load(Ordering::Relaxed)).filter(|count| *count > 0);
    let mut counts = StreamCounts::default();
    for (segment, counters) in [("from_agent", &SENT), ("to_agent", &RECEIVED)] {
        for (kind, counter) in TYPES.into_iter().chain(["UNKNOWN"]).zip(counters) {
            let count = |count| MessageCount { segment: segment.into(), packet_type: kind.into(), count };
            counts.packets.extend(value(counter).map(count));
        }
    }
    for (code, counter) in CODES.into_iter().zip(&ERRORS) {
        counts.errors.extend(value(counter).map(|count| ErrorCount { code: code.into(), count }));
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_gos_by_number_and_types_have_bounds() {
        for (code, name) in [(Code::Ok, "OK"), (Code::Cancelled, "Canceled"), (Code::Unavailable, "Unavailable")] {
            assert_eq!(CODES[code as usize], name);
        }
        assert_eq!(Code::Unauthenticated as usize + 1, CODES.len());
        for kind in [-1, 7, i32::MAX, i32::MIN, 4] {
            received(kind);
        }
        failed(Code::Internal);
        let counts = counted();
        let unknown = |each: &&MessageCount| each.segment == "to_agent" && each.packet_type == "UNKNOWN";
        assert!(counts.packets.iter().any(|each| unknown(&each) && each.count >= 4), "{counts:?}");
        assert!(counts.errors.iter().any(|each| each.code == "Internal"), "{counts:?}");
    }
}
