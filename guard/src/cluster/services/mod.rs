//! Owns what the guard knows of the cluster's Services, on request (`--watch-services`): which endpoints are behind a ClusterIP.
//! Called by `dial` for each address before it is judged; `report` says how current it is.
//! Must never admit anything: what it picks is judged as any other address, and what it does not know is refused.
//!
//! Reading order: `view` (what is known, and the choice: judgement) -> `objects` (objects of the API to that) -> `watch` (keeps it current) -> `known` (what a dial asks).

pub mod feed;
pub mod known;
mod objects;
pub mod view;
pub mod watch;
