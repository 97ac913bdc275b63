//! Owns what the API server knows: the leases of proxy-servers, Services and their endpoints.
//! Called by `dial` and `tunnel`.
//! Must never admit anything: what it learns is judged.

pub mod api_server;
pub mod leases;
pub mod services;
