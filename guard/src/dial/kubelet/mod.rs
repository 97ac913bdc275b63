//! Owns what a policy asks of kubelet's serving certificate.
//! Called by `serve`, before it dials.
//! Must never let a dial through on a check that another listener passed.

mod certificate;
pub mod check;
