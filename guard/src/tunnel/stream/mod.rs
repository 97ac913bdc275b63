//! Owns one stream to one proxy-server, from the first connection to its end.
//! Called by `run`.
//! Must never outlive the server's or the operator's word that it ends.

pub mod batch;
pub(crate) mod credentials;
pub mod establish;
mod goaway;
pub mod session;
