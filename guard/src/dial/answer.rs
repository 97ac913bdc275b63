//! Owns the words of a dial that came to nothing: what the control plane and its users read.
//! Called by `serve`, for the answer to the proxy-server.
//! Must never let what somebody wrote in an address, a name or a path decide the HTTP status.
//!
//! The proxy-server (v0.36.0, `pkg/server/server.go`) looks for words in the text, in any case: `timeout` or `deadline exceeded` is 504,
//! `too many open files` is 503, everything else 502.

use std::{error::Error, io};

use guard_policy::refusal::Refusal;

use crate::{
    dial::{
        backend::BackendError,
        failure::{Failure, LookupError},
    },
    sys::error_chain::with_causes,
};

/// The words that mean another status than 502, and what is written instead.
const WORDS: [(&str, &str); 3] = [
    ("timeout", "time-out"),
    ("deadline exceeded", "deadline-exceeded"),
    ("too many open files", "too-many open files"),
];

/// The answer to a dial that came to nothing, in the words of Go, which the server and its users look for. `None` if nobody waits for one.
pub(crate) fn answer(requested: &str, failure: &Failure) -> Option<String> {
    Some(match failure {
        Failure::Refused { refusal, detail } => refused(requested, *refusal, detail.as_deref()),
        Failure::Unresolved { host, cause } => {
            let why = match cause {
                LookupError::NoSuchHost => "no such host",
                LookupError::TimedOut => "i/o timeout",
            };
            format!("dial tcp: lookup {}: {why}", quote(host))
        }
        Failure::Unreachable { address, cause } => format!("dial tcp {address}: {}", unreachable(cause)),
        Failure::GaveUp | Failure::TunnelLost => return None,
    })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "every other error is reported in the system's own words")]
fn unreachable(cause: &BackendError) -> String {
    let error = match cause {
        BackendError::TimedOut => return "i/o timeout".to_owned(),
        BackendError::Pinhole(error) => {
            return format!("connect: {}", plain(&with_causes(error.to_string(), error.source())));
        }
        BackendError::Socket(error) => error,
    };
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        io::ErrorKind::ConnectionReset => "connect: connection reset by peer".to_owned(),
        io::ErrorKind::TimedOut => "i/o timeout".to_owned(),
        io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
        io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            "socket: too many open files".to_owned()
        }
        _ => format!("connect: {}", plain(&error.to_string())),
    }
}

fn refused(requested: &str, refusal: Refusal, detail: Option<&str>) -> String {
    let detail = detail.map(|detail| format!(": {}", plain(detail))).unwrap_or_default();
    format!("nodeguard refuses {}: {refusal}{detail}", quote(requested))
}

/// An address or a name as it was written, if the server can take nothing in it for something else.
fn quote(written: &str) -> &str {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    let harmless = written.len() <= 300 && written.bytes().all(letters) && plain(written) == written;
    if harmless { written } else { "the address" }
}

/// The text without the words that change the status.
fn plain(text: &str) -> String {
    let mut text = text.to_owned();
    for (word, instead) in WORDS {
        while let Some(at) = text.to_ascii_lowercase().find(word) {
            text.replace_range(at..at + word.len(), instead);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use aya::maps::MapError;
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::pinholes::PinholeError;

    /// As `pkg/server/server.go` of v0.36.0 maps an error to a status.
    fn status(text: &str) -> u16 {
        let text = text.to_lowercase();
        if ["i/o timeout", "deadline exceeded", "context deadline exceeded", "timeout"]
            .iter()
            .any(|word| text.contains(word))
        {
            504
        } else if text.contains("too many open files") {
            503
        } else {
            502
        }
    }

    #[test]
    fn every_text_means_its_status() {
        let address = "10.0.0.1:80".parse().unwrap();
        let connect = |cause: BackendError| Failure::Unreachable { address, cause };
        let os = |code| connect(io::Error::from_raw_os_error(code).into());
        let lookup = |host: &str, cause| Failure::Unresolved { host: host.to_owned(), cause };
        let cases = [
            (os(libc::ECONNREFUSED), "connection-refused", 502, "dial tcp 10.0.0.1:80: connect: connection refused"),
            (os(libc::ECONNRESET), "connection-reset", 502, "dial tcp 10.0.0.1:80: connect: connection reset by peer"),
            (
                os(libc::ENETUNREACH),
                "network-unreachable",
                502,
                "dial tcp 10.0.0.1:80: connect: network is unreachable",
            ),
            (os(libc::EHOSTUNREACH), "no-route", 502, "dial tcp 10.0.0.1:80: connect: no route to host"),
            (os(libc::ETIMEDOUT), "timeout", 504, "dial tcp 10.0.0.1:80: i/o timeout"),
            (
                connect(io::Error::from(io::ErrorKind::TimedOut).into()),
                "timeout",
                504,
                "dial tcp 10.0.0.1:80: i/o timeout",
            ),
            (os(libc::EMFILE), "too-many-open-files", 503, "dial tcp 10.0.0.1:80: socket: too many open files"),
            (os(libc::ENFILE), "too-many-open-files", 503, "dial tcp 10.0.0.1:80: socket: too many open files"),
            (
                os(libc::EPERM),
                "not-permitted",
                502,
                "dial tcp 10.0.0.1:80: connect: Operation not permitted (os error 1)",
            ),
            (
                os(libc::EADDRNOTAVAIL),
                "other",
                502,
                "dial tcp 10.0.0.1:80: connect: Cannot assign requested address (os error 99)",
            ),
            (
                connect(io::Error::other("no pinhole: Timeout").into()),
                "other",
                502,
                "dial tcp 10.0.0.1:80: connect: no pinhole: time-out",
            ),
            (connect(BackendError::TimedOut), "timeout", 504, "dial tcp 10.0.0.1:80: i/o timeout"),
            (
                connect(BackendError::Pinhole(PinholeError { cookie: 7, source: MapError::ElementNotFound })),
                "other",
                502,
                "dial tcp 10.0.0.1:80: connect: no pinhole in the kernel: element not found",
            ),
            (lookup("node-1", LookupError::NoSuchHost), "no-such-host", 502, "dial tcp: lookup node-1: no such host"),
            (lookup("node-1", LookupError::TimedOut), "timeout", 504, "dial tcp: lookup node-1: i/o timeout"),
            (
                lookup("timeout.example", LookupError::NoSuchHost),
                "no-such-host",
                502,
                "dial tcp: lookup the address: no such host",
            ),
        ];
        for (failed, reason, want, text) in cases {
            let answer = answer("node-1:80", &failed).unwrap();
            assert_eq!((failed.reason(), status(&answer), answer.as_str()), (reason, want, text));
            assert_eq!(failed.timed_out(), want == 504, "{text}");
        }
    }

    #[test]
    fn a_refusal_is_502_whatever_was_asked_for() {
        for refusal in Refusal::ALL {
            for requested in
                ["10.0.0.1:80", "TimeOut.example:80", "too many open files:1", "", "a\r\nb:1", &"a".repeat(4000)]
            {
                let text = refused(requested, refusal, Some("the CA file /etc/timeout/ca.crt: Deadline Exceeded"));
                assert_eq!(status(&text), 502, "{text}");
                assert!(text.len() < 900 && !text.contains('\n'), "{text}");
            }
            assert!(refused("10.0.0.1:80", refusal, None).starts_with("nodeguard refuses 10.0.0.1:80: "));
        }
        let another = refused("10.0.0.9:10250", Refusal::AnotherNode, None);
        assert!(another.contains("--proxy-strategies=destHost"), "{another}");
        // Names are words in metrics and records: one each.
        let names: std::collections::BTreeSet<_> = Refusal::ALL.iter().map(|refusal| refusal.name()).collect();
        assert_eq!(names.len(), Refusal::ALL.len());
    }

    proptest! {
        #[test]
        fn nothing_written_decides_about_the_status(written in "\\PC{0,40}(timeout|TIMEOUT|deadline exceeded|too many open files|timetimeoutout)?\\PC{0,10}") {
            for refusal in Refusal::ALL {
                prop_assert_eq!(status(&refused(&written, refusal, Some(&written))), 502);
            }
            let lookup = Failure::Unresolved { host: written, cause: LookupError::NoSuchHost };
            prop_assert_eq!(status(&answer("", &lookup).unwrap()), 502);
        }
    }
}
