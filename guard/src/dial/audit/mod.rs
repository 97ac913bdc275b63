//! Owns the record of every dial: one for each, to the log, to a file on request, and into the totals.
//! Called by `dial`, which begins an entry with each DIAL_REQ; `report` reads the totals.
//! Must never hold up a dial: what cannot be written is counted and reported.

pub mod entry;
pub mod file;
pub mod record;
pub mod totals;
