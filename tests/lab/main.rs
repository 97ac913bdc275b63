//! The whole guard in network namespaces: the main job, a killed daemon, edits, removal.

mod edits;
mod kill;
mod main_job;
mod unpin;
