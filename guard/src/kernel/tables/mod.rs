//! Owns the tables that the programs read: planning a change, writing it, and reading the tables back.
//! Called by `daemon/run` at start, `daemon/edit` for every edit, `daemon/hold` for mending, and `report`.
//! Must never be written by anything but `apply`.

pub mod apply;
pub mod apply_error;
pub mod large_map;
pub mod map_batches;
pub mod plan;
pub mod read_back;
pub mod ruleset_maps;
