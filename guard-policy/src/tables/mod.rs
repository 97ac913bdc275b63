//! Owns the kernel's tables as data: their content for a ruleset, and the same look-ups on the host.
//! Called by `compile`, by `kernel/tables` and by `kernel/cut`.
//! Must never write to the kernel.

pub(crate) mod build;
pub mod cgroups;
pub(crate) mod destinations;
pub mod host;
pub mod image;
pub(crate) mod peers;
pub mod pod_scopes;
