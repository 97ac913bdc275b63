//! Owns one stream to one proxy-server, from the first connection to its end.
//! Called by `supervisor`.
//! Must never go on after the server or the operator has ended it.

pub mod batch;
pub(crate) mod credentials;
pub mod establish;
mod goaway;
pub mod session;
