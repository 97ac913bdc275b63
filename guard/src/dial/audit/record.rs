//! Owns the record of a dial: one line of the log and of the audit file.
//! Called by `entry`, which fills it, by `file` and `totals`.
//! Must never be written twice for one dial.

use std::net::SocketAddr;

use serde::Serialize;

/// What became of a dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was open.
    Admitted,
    /// By policy or shape.
    Refused,
    /// Admitted, and the backend could not be reached.
    Failed,
    /// The control plane or the stream was gone before there was an answer.
    Abandoned,
}

impl Verdict {
    /// The stable name.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Admitted => "admitted",
            Verdict::Refused => "refused",
            Verdict::Failed => "failed",
            Verdict::Abandoned => "abandoned",
        }
    }
}

/// One line of the audit file.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// RFC 3339: when it was asked for.
    pub time: String,
    /// What the proxy-server that asked calls itself.
    pub server: String,
    /// What was asked for.
    pub requested: String,
    /// The address that was judged last, if it came to that; with `admitted`, the one that was dialled.
    pub dialled: Option<SocketAddr>,
    /// The Service that was asked for, where it is an endpoint of one.
    pub service: Option<String>,
    /// The entry of the policy that admits it.
    pub rule: Option<String>,
    /// What became of it.
    pub verdict: Verdict,
    /// A stable word: why it was closed, refused, or failed.
    pub reason: &'static str,
    /// The answer to the control plane, where it was an error.
    pub message: Option<String>,
    /// Bytes that the backend got.
    pub to_backend: u64,
    /// Bytes that were sent to the control plane.
    pub to_control_plane: u64,
    /// From the request to the end.
    pub milliseconds: u64,
}
