//! Owns the kernel's tables as data: what a ruleset puts into them, and the same look-ups on the host.
//! Called by `compile` and by the daemon's plan of an edit.
//! Must never write to the kernel.

pub(crate) mod build;
pub mod cgroups;
pub(crate) mod destinations;
pub mod host;
pub mod image;
pub(crate) mod peers;
