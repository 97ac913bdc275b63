//! Owns the messages of the tunnel: as bytes, as types, and their counters.
//! Called by `dial` and `tunnel`.
//! Must never act on a message.

pub mod bodies;
pub mod counts;
pub mod frames;
