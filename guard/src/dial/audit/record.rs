//! Owns the record of a dial: one line of the log and of the audit file.
//! Called by `recorder`, which fills it, and by `file` and `totals`.
//! Must never be written twice for one dial.

use std::net::SocketAddr;

use serde::Serialize;

/// What became of a dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DialOutcome {
    /// It was open.
    Admitted,
    /// The policy, a limit or the shape of the request refused it.
    Refused,
    /// The policy allows it, but the backend could not be reached.
    Failed,
    /// The control plane gave up or the stream ended before there was an answer.
    Abandoned,
}

impl DialOutcome {
    /// The stable name.
    pub fn name(self) -> &'static str {
        match self {
            DialOutcome::Admitted => "admitted",
            DialOutcome::Refused => "refused",
            DialOutcome::Failed => "failed",
            DialOutcome::Abandoned => "abandoned",
        }
    }
}

/// One line of the audit file.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// When it was requested (RFC 3339).
    pub time: String,
    /// The id that the proxy-server gives itself.
    pub server: String,
    /// The requested address.
    pub requested: String,
    /// The address that was judged last, if one was; for `admitted`, the address that was dialled.
    pub dialled: Option<SocketAddr>,
    /// The requested Service, if the address is an endpoint of one.
    pub service: Option<String>,
    /// The entry of the policy that admits it.
    pub rule: Option<String>,
    /// What became of it. The key in the file is older than this name.
    #[serde(rename = "verdict")]
    pub outcome: DialOutcome,
    /// Why it was closed, was refused or failed: a stable word.
    pub reason: &'static str,
    /// The answer to the control plane, if it is an error.
    pub message: Option<String>,
    /// Bytes that the backend received.
    pub to_backend: u64,
    /// Bytes that were sent to the control plane.
    pub to_control_plane: u64,
    /// Time from the request to the end.
    pub milliseconds: u64,
}
