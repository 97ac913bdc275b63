//! Owns the record of every dial: one for each, to the log, to a file on request, and into the totals.
//! Called by `serve`, which begins a record with each DIAL_REQ; `report` reads the totals.
//! Must never hold up a dial: what cannot be written is counted and reported.

pub mod file;
pub mod record;
pub mod recorder;
pub mod totals;
