//! Owns the limits of the tunnel half: flags, defaults, and what they mean together.
//! Called by `args` (the flags), `config` (resolves them), `budget`, `dial` and `session` (keep to them).
//! Must never be unlimited by default: the control plane, or whoever took it over, decides how much comes.

use std::time::Duration;

/// What the control plane may use of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that may wait for one backend whatever it does.
    pub connection: usize,
    /// Bytes that may wait for all backends together.
    pub memory: usize,
    /// How long bytes may wait for a backend that takes none.
    pub stall: Duration,
    /// Dials under way at once, of all streams.
    pub dials: usize,
    /// Dials under way at once, of one stream.
    pub dials_per_stream: usize,
    /// How long a dial may take, its name's resolution included.
    pub dial: Duration,
    /// Connections open at once.
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
