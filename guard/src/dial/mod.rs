//! Owns a dial of the control plane, from its request to its record. `serve` is the walk.
//! Called by the sessions of the tunnel.
//! Must never connect without a permit.

mod answer;
mod arrival;
pub mod audit;
mod backend;
mod backlog;
pub mod budget;
pub mod connections;
pub mod dialling;
mod failure;
pub mod gate;
pub mod hello;
pub mod kubelet;
pub mod limits;
pub mod queue;
pub mod relay;
pub mod routes;
pub mod serve;
mod target;
