//! Owns the messages of the tunnel, as bytes and as types, and how many there were.
//! Called by `dial` and `tunnel`.
//! Must never know what a message asks for.

pub mod bodies;
pub mod counts;
pub mod frames;
