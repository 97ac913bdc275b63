//! Owns the totals of dials: by outcome, reason, size and time.
//! Called by `audit` with each record; `status` and the metrics show them.
//! Must never grow with what the control plane asks for: every reason is a word of this program.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    dial::audit::record::{DialOutcome, Record},
    sys::histogram::{Histogram, UPSTREAM_BUCKETS},
};

/// Seconds: from one request to a log that is followed for a day.
const CONNECTIONS: [f64; 7] = [0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0];

/// What became of all dials so far.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// The number of audit records.
    pub records: u64,
    /// Dials by outcome and reason; an admitted one counts when it opens.
    pub dials: Vec<OutcomeCount>,
    /// Open dials that ended, by reason.
    pub closed: Vec<OutcomeCount>,
    /// Bytes sent to backends by dials that ended.
    pub to_backend: u64,
    /// Bytes sent to the control plane by dials that ended.
    pub to_control_plane: u64,
    /// The time from the request to its answer, of admitted dials.
    pub dial_seconds: Histogram,
    /// How long dials that ended were open.
    pub open_seconds: Histogram,
}

/// The number of dials with one outcome and reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutcomeCount {
    /// `admitted`, `refused`, `failed` or `abandoned`.
    pub verdict: String,
    /// The reason.
    pub reason: String,
    /// How many.
    pub count: u64,
}

impl Default for Totals {
    fn default() -> Totals {
        Totals {
            records: 0,
            dials: Vec::new(),
            closed: Vec::new(),
            to_backend: 0,
            to_control_plane: 0,
            dial_seconds: Histogram::new(&UPSTREAM_BUCKETS),
            open_seconds: Histogram::new(&CONNECTIONS),
        }
    }
}

impl Totals {
    pub(crate) fn opened(&mut self, took: Duration) {
        add(&mut self.dials, DialOutcome::Admitted, "open");
        self.dial_seconds.observe(took);
    }

    pub(crate) fn ended(&mut self, record: &Record, open: Option<Duration>) {
        self.records += 1;
        self.to_backend += record.to_backend;
        self.to_control_plane += record.to_control_plane;
        match open {
            Some(open) => {
                add(&mut self.closed, record.outcome, record.reason);
                self.open_seconds.observe(open);
            }
            None => add(&mut self.dials, record.outcome, record.reason),
        }
    }

    /// Dials of one outcome and reason.
    pub fn count(&self, verdict: &str, reason: &str) -> u64 {
        let of = |count: &&OutcomeCount| count.verdict == verdict && count.reason == reason;
        self.dials.iter().filter(of).map(|count| count.count).sum()
    }

    /// Dials of one outcome.
    pub fn outcome(&self, verdict: &str) -> u64 {
        self.dials.iter().filter(|count| count.verdict == verdict).map(|count| count.count).sum()
    }

    /// Open dials that ended for a reason.
    pub fn closes(&self, reason: &str) -> u64 {
        self.closed.iter().filter(|count| count.reason == reason).map(|count| count.count).sum()
    }
}

fn add(counts: &mut Vec<OutcomeCount>, outcome: DialOutcome, reason: &'static str) {
    let verdict = outcome.name();
    match counts.iter_mut().find(|count| count.verdict == verdict && count.reason == reason) {
        Some(count) => count.count += 1,
        None => counts.push(OutcomeCount { verdict: verdict.to_owned(), reason: reason.to_owned(), count: 1 }),
    }
}
