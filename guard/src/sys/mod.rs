//! Owns general parts: a watch on files, units, times, texts of errors, the facts of this node.
//! Called by every other room.
//! Must never know what the guard does.

pub mod error_chain;
pub mod file_watch;
pub mod histogram;
pub mod lock;
pub mod place;
pub mod read_node_facts;
pub mod times;
pub mod units;
