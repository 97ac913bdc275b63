//! Owns a histogram of durations with fixed buckets.
//! Called by what measures: dials and requests to the API server.
//! Must never grow: the buckets are chosen when it is made.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The buckets of the upstream agent for dials and for requests, in seconds.
pub const UPSTREAM_BUCKETS: [f64; 7] = [0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 30.0];

/// Durations in seconds, counted in buckets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Histogram {
    /// The upper bound of each bucket, in seconds, ascending.
    pub bounds: Vec<f64>,
    /// The number of durations in each bucket; the last one, which has no bound, holds the longer ones.
    pub counts: Vec<u64>,
    /// The sum of all durations.
    pub sum: f64,
}

impl Histogram {
    /// An empty histogram with these upper bounds.
    pub fn new(bounds: &[f64]) -> Histogram {
        Histogram { bounds: bounds.to_vec(), counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// Counts a duration.
    pub fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(self.bounds.len());
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += seconds;
    }

    /// The number of durations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}
