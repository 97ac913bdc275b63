//! Owns a dial of the control plane, from its request to its record.
//! Called by the tunnel's sessions.
//! Must never connect without a permit.

pub mod answer;
pub mod audit;
pub mod budget;
pub mod connections;
pub mod gate;
pub mod hello;
pub mod kubelet;
pub mod limits;
pub mod queue;
pub mod relay;
pub mod serve;
