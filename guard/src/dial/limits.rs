//! Owns the limits of dials and their defaults.
//! Called by `cli` (the flags), and by `budget`, `serve` and `session`, which keep them.
//! Must never be unlimited by default: the control plane, or whoever took it over, decides how much comes.

use std::time::Duration;

/// What the control plane may use of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that may wait for one backend, even if it does not read.
    pub connection: usize,
    /// Bytes that may wait for all backends together.
    pub memory: usize,
    /// How long bytes may wait for a backend that reads none.
    pub stall: Duration,
    /// Pending dials of all streams together.
    pub dials: usize,
    /// Pending dials of one stream.
    pub dials_per_stream: usize,
    /// How long a dial may take, including the look-up of its name.
    pub dial: Duration,
    /// Open connections.
    pub connections: usize,
}

impl Default for Limits {
    /// The defaults of the flags.
    fn default() -> Limits {
        Limits {
            connection: 8 << 20,
            memory: 256 << 20,
            stall: Duration::from_secs(30),
            dials: 1024,
            dials_per_stream: 512,
            dial: Duration::from_secs(5),
            connections: 65_536,
        }
    }
}
