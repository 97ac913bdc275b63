//! Owns the words of a dial that came to nothing: what the control plane and its users read.
//! Called by `dial`, for the answer to the proxy-server.
//! Must never let what somebody wrote in an address, a name or a path decide about the HTTP status.
//!
//! The proxy-server (v0.36.0, `pkg/server/server.go`) looks for words in the text, in any case: `timeout` or `deadline exceeded` is 504,
//! `too many open files` is 503, everything else 502.

use std::{io, net::SocketAddr};

use guard_policy::refusal::Refusal;

/// The reason of whatever took too long.
pub(crate) const TIMEOUT: &str = "timeout";

/// The words that mean something else than 502.
const WORDS: [(&str, &str); 3] = [
    ("timeout", "time-out"),
    ("deadline exceeded", "deadline-exceeded"),
    ("too many open files", "too-many open files"),
];

/// Why a backend was not reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unreachable {
    /// A stable word.
    pub(crate) reason: &'static str,
    /// In the words of Go, which the server and its users look for.
    pub(crate) text: String,
}

/// A name that was not resolved.
pub(crate) fn lookup(host: &str, why: &str) -> Unreachable {
    let reason = if why.ends_with("timeout") { TIMEOUT } else { "no-such-host" };
    Unreachable { reason, text: format!("dial tcp: lookup {}: {why}", quote(host)) }
}

/// A connection that was not made.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error is told in the system's own words")]
pub(crate) fn connect(address: SocketAddr, error: &io::Error) -> Unreachable {
    let (reason, words) = match error.kind() {
        io::ErrorKind::ConnectionRefused => ("connection-refused", "connect: connection refused".to_owned()),
        io::ErrorKind::ConnectionReset => ("connection-reset", "connect: connection reset by peer".to_owned()),
        io::ErrorKind::TimedOut => (TIMEOUT, "i/o timeout".to_owned()),
        io::ErrorKind::NetworkUnreachable => ("network-unreachable", "connect: network is unreachable".to_owned()),
        io::ErrorKind::HostUnreachable => ("no-route", "connect: no route to host".to_owned()),
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            ("too-many-open-files", "socket: too many open files".to_owned())
        }
        io::ErrorKind::PermissionDenied => ("not-permitted", format!("connect: {}", plain(&error.to_string()))),
        _ => ("other", format!("connect: {}", plain(&error.to_string()))),
    };
    Unreachable { reason, text: format!("dial tcp {address}: {words}") }
}

/// A dial that is refused.
pub(crate) fn refused(requested: &str, refusal: Refusal, more: Option<&str>) -> String {
    let more = more.map(|more| format!(": {}", plain(more))).unwrap_or_default();
    format!("nodeguard refuses {}: {refusal}{more}", quote(requested))
}

/// An address or a name as it was written, if nothing in it can be taken for something else.
fn quote(written: &str) -> &str {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    let harmless = written.len() <= 300 && written.bytes().all(letters) && plain(written) == written;
    if harmless { written } else { "the address" }
}

/// A text without the words that mean something to the server.
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
    use proptest::prelude::*;

    use super::*;

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
        let os = |code| connect(address, &io::Error::from_raw_os_error(code));
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
            (connect(address, &io::ErrorKind::TimedOut.into()), "timeout", 504, "dial tcp 10.0.0.1:80: i/o timeout"),
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
                connect(address, &io::Error::other("no pinhole: Timeout")),
                "other",
                502,
                "dial tcp 10.0.0.1:80: connect: no pinhole: time-out",
            ),
            (lookup("node-1", "no such host"), "no-such-host", 502, "dial tcp: lookup node-1: no such host"),
            (lookup("node-1", "i/o timeout"), "timeout", 504, "dial tcp: lookup node-1: i/o timeout"),
            (
                lookup("timeout.example", "no such host"),
                "no-such-host",
                502,
                "dial tcp: lookup the address: no such host",
            ),
        ];
        for (failed, reason, want, text) in cases {
            assert_eq!((failed.reason, status(&failed.text), failed.text.as_str()), (reason, want, text));
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
            prop_assert_eq!(status(&lookup(&written, "no such host").text), 502);
        }
    }
}
