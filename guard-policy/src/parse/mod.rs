//! Owns reading a document: every value strictly, with a diagnostic at its place.
//! Called by `compile`.
//! Must never guess what was meant.

pub(crate) mod checked;
pub(crate) mod last_hop;
pub(crate) mod rules;
pub(crate) mod scalars;
pub(crate) mod service_range;
pub(crate) mod uplinks;
