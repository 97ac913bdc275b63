//! Owns the lab: network namespaces with a control plane, a node, a pod, a stranger, an allowed and an excepted peer; in them the real
//! proxy-server, a TLS kubelet stand-in, pod servers and the guard.
//! Called by the tests and by the demo.
//! Must never send a packet outside the namespaces it made, and never leave anything behind.
//!
//! Reading order: `lab` (what stands where) -> `net`, `process`, `certs`, `server`, `daemon` (its parts) -> `client` (attempts and what
//! became of them) -> `helper` (what runs in the node and in pods) -> `attempts` (the main job, line by line).

pub mod attempts;
pub mod certs;
pub mod client;
pub mod daemon;
pub mod helper;
pub mod lab;
pub mod net;
pub mod process;
pub mod server;
pub mod sweep;
