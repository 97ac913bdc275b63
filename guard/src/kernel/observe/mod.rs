//! Owns what the programs report: events of denials, how full the maps are, how long the programs ran.
//! Called by the daemon and by `report`.
//! Must never change what is in force.

pub mod events;
pub mod map_use;
pub mod packets;
