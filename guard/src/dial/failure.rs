//! Owns why a dial comes to nothing: the whole space, as facts.
//! Called by `serve`, whose phases return it, and by `answer`, which puts it into words.
//! Must never hold a text where a fact will do: the words of an answer are made in `answer` alone.

use std::{io, net::SocketAddr};

use guard_policy::refusal::Refusal;

use crate::dial::{audit::record::DialOutcome, backend::BackendError};

/// The reason of whatever took too long.
const TIMEOUT: &str = "timeout";

/// Why a dial comes to nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The policy, a limit or the shape of the request refuses it.
    Refused {
        /// Why.
        refusal: Refusal,
        /// What there is to say beyond that.
        detail: Option<String>,
    },
    /// The resolver has no address for the host.
    Unresolved {
        /// As it was asked for.
        host: String,
        /// Why.
        cause: LookupError,
    },
    /// The backend could not be connected.
    Unreachable {
        /// The backend.
        address: SocketAddr,
        /// Why.
        cause: BackendError,
    },
    /// The control plane did not wait for the answer.
    GaveUp,
    /// The stream ended before there was an answer.
    TunnelLost,
}

/// Why a host name has no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookupError {
    /// The resolver knows no such host.
    NoSuchHost,
    /// The time of the dial was over.
    TimedOut,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Refused { refusal, detail: None }
    }
}

impl Failure {
    /// What became of the dial.
    pub(crate) fn outcome(&self) -> DialOutcome {
        match self {
            Failure::Refused { .. } => DialOutcome::Refused,
            Failure::Unresolved { .. } | Failure::Unreachable { .. } => DialOutcome::Failed,
            Failure::GaveUp | Failure::TunnelLost => DialOutcome::Abandoned,
        }
    }

    /// The stable word for records and metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Failure::Refused { refusal, .. } => refusal.name(),
            Failure::Unresolved { cause: LookupError::NoSuchHost, .. } => "no-such-host",
            Failure::Unresolved { cause: LookupError::TimedOut, .. } => TIMEOUT,
            Failure::Unreachable { cause, .. } => unreachable_reason(cause),
            Failure::GaveUp => "control-plane-gave-up",
            Failure::TunnelLost => "tunnel-lost",
        }
    }

    /// Whether the time of the dial was over.
    pub(crate) fn timed_out(&self) -> bool {
        self.reason() == TIMEOUT
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "every other error of the system has the reason `other`")]
fn unreachable_reason(cause: &BackendError) -> &'static str {
    let error = match cause {
        BackendError::TimedOut => return TIMEOUT,
        BackendError::Pinhole(_) => return "other",
        BackendError::Socket(error) => error,
    };
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection-refused",
        io::ErrorKind::ConnectionReset => "connection-reset",
        io::ErrorKind::TimedOut => TIMEOUT,
        io::ErrorKind::NetworkUnreachable => "network-unreachable",
        io::ErrorKind::HostUnreachable => "no-route",
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => "too-many-open-files",
        io::ErrorKind::PermissionDenied => "not-permitted",
        _ => "other",
    }
}
