//! Owns the checks of what a policy asks of kubelet's serving certificate.
//! Called by `serve`, before it dials.
//! Must never let a dial through on a check that another listener passed.

pub mod certificate;
pub mod check;
