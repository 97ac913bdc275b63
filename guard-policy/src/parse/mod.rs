//! Owns parsing the values of a document strictly, with a diagnostic at the position of each mistake.
//! Called by `compile`.
//! Must never guess what the author meant.

pub(crate) mod checked;
pub(crate) mod last_hop;
pub(crate) mod rules;
pub(crate) mod scalars;
pub(crate) mod service_range;
pub(crate) mod unheard;
pub(crate) mod uplinks;
