//! Owns the lab: network namespaces with a control plane, a node, a pod, a stranger, an allowed and an excepted peer; in them the real
//! proxy-server, a TLS kubelet stand-in, pod servers and the guard.
//! Called by the tests and by the demo.
//! Must never send a packet outside the namespaces it made, and never leave anything behind.
//!
//! Reading order: `lab` (what stands where) -> `net`, `process`, `certs`, `server`, `daemon` (its parts), `rights` (what the guard may do) -> `client` (attempts and what
//! became of them) -> `helper` (what runs in the node and in pods) -> `attempts` (the main job, line by line). `isolated` is the small
//! way: loopback only; in it `bare` (agents without a kernel half), `endpoint` (what they dial), `load` (what the control plane does),
//! `fleet` (several real servers, a balancer), `kube_api` (what an API server says of tokens and leases; `kube_objects`: of Services), `fake` (a server that is not the
//! real one), `hostile` (what it may do), `http_proxy` (on the way to a server). `agree` and `packets` compare the kernel's decisions with the host's; `shapes` are real packets
//! (`craft`, `wire`, `judged`).

pub mod agree;
pub mod attempts;
pub mod bare;
pub mod bench;
pub mod certs;
pub mod client;
pub mod craft;
pub mod daemon;
pub mod endpoint;
pub mod fake;
pub mod fleet;
pub mod helper;
pub mod hostile;
pub mod http_proxy;
pub mod isolated;
pub mod judged;
pub mod kube_api;
pub mod kube_objects;
pub mod lab;
pub mod load;
pub mod net;
pub mod packets;
pub mod process;
pub mod rights;
pub mod server;
pub mod shapes;
pub mod sweep;
pub mod traffic;
pub mod wire;
