//! Owns the counters of messages and errors of all streams, as upstream counts them.
//! Called by `frames` and `bodies` for each message, and by `tunnel/stream/session` for a stream that ends with an error; `report` reads them.
//! Must never keep more of a message than its type.

use std::{
    fmt::{self, Write},
    sync::atomic::{AtomicU64, Ordering},
};

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

/// Writes upstream's three families; as there, one that counts nothing is left out.
pub fn encode(out: &mut String, prefix: &str) -> fmt::Result {
    let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let failures: u64 = ERRORS.iter().map(value).sum();
    let directions =
        [("from_server".to_owned(), failures)].map(|(name, count)| (format!("direction=\"{name}\""), count));
    let help = "Count of failures to send to or receive from the proxy server, labeled by the direction (from_server or to_server). DEPRECATED, please use stream_events_error_total";
    family(out, &format!("{prefix}server_connection_failure_count"), help, &directions)?;
    let errors = CODES.iter().zip(&ERRORS).map(|(code, counter)| {
        (format!("segment=\"to_agent\",code=\"{code}\",packet_type=\"Unknown\""), value(counter))
    });
    let help = "Count of gRPC stream errors, by segment, grpc Code, packet type. (example: from_agent, Code.Unavailable, DIAL_RSP)";
    family(out, &format!("{prefix}stream_errors_total"), help, &errors.collect::<Vec<_>>())?;
    let mut packets = Vec::new();
    for (segment, counts) in [("from_agent", &SENT), ("to_agent", &RECEIVED)] {
        for (kind, counter) in TYPES.iter().chain(&["UNKNOWN"]).zip(counts) {
            packets.push((format!("segment=\"{segment}\",packet_type=\"{kind}\""), value(counter)));
        }
    }
    let help = "Count of packets processed, by segment and packet type (example: from_client, DIAL_REQ)";
    family(out, &format!("{prefix}stream_packets_total"), help, &packets)
}

fn family(out: &mut String, name: &str, help: &str, values: &[(String, u64)]) -> fmt::Result {
    if values.iter().all(|(_, count)| *count == 0) {
        return Ok(());
    }
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter")?;
    for (labels, count) in values.iter().filter(|(_, count)| *count > 0) {
        writeln!(out, "{name}{{{labels}}} {count}")?;
    }
    Ok(())
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
        let mut text = String::new();
        encode(&mut text, "p_").unwrap();
        assert!(text.contains("p_stream_packets_total{segment=\"to_agent\",packet_type=\"UNKNOWN\"}"), "{text}");
        assert!(
            text.contains("p_stream_errors_total{segment=\"to_agent\",code=\"Internal\",packet_type=\"Unknown\"}"),
            "{text}"
        );
        assert!(text.contains("p_server_connection_failure_count{direction=\"from_server\"}"), "{text}");
    }
}
