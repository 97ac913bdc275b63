//! Owns the totals of dials: by outcome, reason, size and time, and the same as Prometheus text.
//! Called by `audit` with each record; `status` and `metrics` show them.
//! Must never grow with what the control plane asks for: every label is a word of this program.

use std::{
    fmt::{self, Write},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    dial::audit::record::{DialOutcome, Record},
    sys::metrics_text::family,
};

/// Seconds: upstream's buckets for a dial.
const DIALS: [f64; 7] = [0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 30.0];
/// Seconds: from one request to a log that is followed for a day.
const CONNECTIONS: [f64; 7] = [0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0];

/// Everything that is counted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Records so far.
    pub records: u64,
    /// Dials by outcome and reason; an admitted one counts when it opens.
    pub dials: Vec<Count>,
    /// Ends of open dials by reason.
    pub closed: Vec<Count>,
    /// Bytes that backends got.
    pub to_backend: u64,
    /// Bytes that were sent to control planes.
    pub to_control_plane: u64,
    /// From the request to its answer, of admitted dials.
    pub dial_seconds: Histogram,
    /// How long dials were open.
    pub open_seconds: Histogram,
}

/// How many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Of which outcome.
    pub verdict: String,
    /// For which reason.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// A histogram as Prometheus has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// The upper bound of each bucket.
    pub bounds: Vec<f64>,
    /// How many up to that bound and above the one before; one more than bounds.
    pub counts: Vec<u64>,
    /// All of them together.
    pub sum: f64,
}

impl Default for Totals {
    fn default() -> Totals {
        Totals {
            records: 0,
            dials: Vec::new(),
            closed: Vec::new(),
            to_backend: 0,
            to_control_plane: 0,
            dial_seconds: Histogram::new(&DIALS),
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
        let of = |count: &&Count| count.verdict == verdict && count.reason == reason;
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

    /// Writes them in Prometheus' text format.
    pub fn encode(&self, out: &mut String) -> fmt::Result {
        let name = "nodeguard_dials_total";
        family(out, name, "Dials of the control plane by outcome and reason.", "counter")?;
        for Count { verdict, reason, count } in &self.dials {
            writeln!(out, "{name}{{outcome=\"{verdict}\",reason=\"{reason}\"}} {count}")?;
        }
        let name = "nodeguard_dials_closed_total";
        family(out, name, "Open dials that have ended, by reason.", "counter")?;
        for Count { reason, count, .. } in &self.closed {
            writeln!(out, "{name}{{reason=\"{reason}\"}} {count}")?;
        }
        let name = "nodeguard_dial_bytes_total";
        family(out, name, "Bytes of dials that have ended, by direction.", "counter")?;
        for (direction, bytes) in [("to_backend", self.to_backend), ("to_control_plane", self.to_control_plane)] {
            writeln!(out, "{name}{{direction=\"{direction}\"}} {bytes}")?;
        }
        self.dial_seconds.encode(
            out,
            "nodeguard_dial_duration_seconds",
            "From the request to its answer, of dials that were admitted.",
        )?;
        self.open_seconds.encode(out, "nodeguard_dial_open_seconds", "How long dials that have ended were open.")
    }
}

impl Histogram {
    fn new(bounds: &[f64]) -> Histogram {
        Histogram { bounds: bounds.to_vec(), counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(self.bounds.len());
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += seconds;
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Writes it with its HELP and TYPE.
    pub fn encode(&self, out: &mut String, name: &str, help: &str) -> fmt::Result {
        family(out, name, help, "histogram")?;
        let mut below = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            below += count;
            writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {below}")?;
        }
        let count = self.count();
        writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {}\n{name}_count {count}", self.sum)
    }
}

fn add(counts: &mut Vec<Count>, outcome: DialOutcome, reason: &'static str) {
    let verdict = outcome.name();
    match counts.iter_mut().find(|count| count.verdict == verdict && count.reason == reason) {
        Some(count) => count.count += 1,
        None => counts.push(Count { verdict: verdict.to_owned(), reason: reason.to_owned(), count: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_prometheus() {
        let mut histogram = Histogram::new(&DIALS);
        for milliseconds in [1, 5, 6, 40_000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let mut text = String::new();
        histogram.encode(&mut text, "x", "Words.").unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..5],
            [
                "# HELP x Words.",
                "# TYPE x histogram",
                "x_bucket{le=\"0.005\"} 2",
                "x_bucket{le=\"0.025\"} 3",
                "x_bucket{le=\"0.1\"} 3"
            ]
        );
        assert_eq!(lines[8..], ["x_bucket{le=\"30\"} 3", "x_bucket{le=\"+Inf\"} 4", "x_sum 40.012", "x_count 4"]);
    }

    #[test]
    fn the_text_has_every_family_also_when_nothing_happened() {
        let mut text = String::new();
        Totals::default().encode(&mut text).unwrap();
        assert_eq!(text.lines().filter(|line| line.starts_with("# TYPE")).count(), 5);
        assert!(text.contains("nodeguard_dial_bytes_total{direction=\"to_backend\"} 0\n"));
    }
}
