//! Owns the way of a policy file: `watch` -> `document` -> `compile` -> `ruleset`.
//! Called by `app`, and by `nodeguard check`.
//! Must never publish a ruleset that did not compile as a whole.

pub mod check;
pub mod compile;
mod destinations;
pub mod diagnostic;
pub mod document;
mod edge;
mod last_hop;
mod peers;
mod read;
pub mod ruleset;
pub mod services;
mod tables;
mod values;
pub mod watch;
