//! Owns the tables that the programs read: the plan of a change, its writes, and reading them back.
//! Called by the daemon for every edit.
//! Must never be written by anything but `apply`.

pub mod apply;
pub mod apply_error;
pub mod large_map;
pub mod map_batches;
pub mod plan;
pub mod read_back;
pub mod ruleset_maps;
