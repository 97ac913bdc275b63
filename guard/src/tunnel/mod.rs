//! Owns the tunnel: one stream to every proxy-server, replaced whenever one ends or gets old.
//! Called by the daemon, which spawns [`handle::Tunnel::run`].
//! Must never judge or dial: `stream/session` hands each dial to `dial`.
//!
//! Reading order: `settings` -> `servers` (which address is dialled next: judgement) -> `supervisor` (does that) -> `stream` (one stream: `credentials`,
//! `establish`, with `batch` and `goaway` below HTTP/2, and `session`, frames to dials and back). Beside it: `identifiers`, `advertise`, and `handle` (what others see).

pub mod advertise;
pub mod handle;
pub mod identifiers;
pub mod servers;
pub mod settings;
pub mod stream;
mod supervisor;
