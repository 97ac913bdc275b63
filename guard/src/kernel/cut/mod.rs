//! Owns cutting open connections: each is judged as a new attempt would be, and ended if it is denied.
//! Called by `daemon/edit` after every ruleset that came into force, and by `dial/kubelet` to find listeners.
//! Must never judge by other rules than `decide`.

pub mod established;
pub mod sock_diag;
