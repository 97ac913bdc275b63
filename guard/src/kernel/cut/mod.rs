//! Owns the cut: open connections are judged as a new attempt would be, and ended where that is denied.
//! Called by the daemon after every edit.
//! Must never judge by other rules than `decide`.

pub mod established;
pub mod sock_diag;
