//! Owns what all tests and benches stand on: the lab, packets, benches, and the parts that they share.
//! Called by the tests, the demo, the benches, the cluster lab and the guest of the tried kernels.
//! Must never send a packet outside the namespaces it made, and never leave anything behind.
//!
//! - [`lab`]: network namespaces with a control plane, a node, a pod, a stranger, an allowed and an excepted peer; in them the real
//!   proxy-server, a TLS kubelet stand-in, pod servers and the guard. `main_job` is the demo, line by line.
//! - [`packets`]: real packets built byte by byte, sent over a wire, and what becomes of each shape.
//! - [`bench`]: rows, medians and rounds of a bench, and the traffic that is measured.
//! - [`isolated`] is the small way, loopback only; in it [`bare`] (agents without a kernel half), [`endpoint`] (what they dial), [`load`] (what
//!   the control plane does), [`fleet`] (several real servers, a balancer), [`kube_api`] and [`kube_objects`] (what an API server says),
//!   [`fake`] (a server that is not the real one), [`hostile`] (what it may do), [`http_proxy`] (on the way to a server).
//! - [`agree`] compares the kernel's decisions with the host's.
//! - Shared: [`process`], [`certs`], [`server`], [`sweep`].

pub mod agree;
pub mod bare;
pub mod bench;
pub mod certs;
pub mod endpoint;
pub mod fake;
pub mod fleet;
pub mod hostile;
pub mod http_proxy;
pub mod isolated;
pub mod kube_api;
pub mod kube_objects;
pub mod lab;
pub mod load;
pub mod packets;
pub mod process;
pub mod server;
pub mod sweep;

pub use bench::traffic;
pub use lab::{client, daemon, helper, main_job, net, tries};
pub use packets::{judged, shapes, wire};

/// Whether this is a soak (`cargo xtask soak`): full counts and durations.
pub fn soak() -> bool {
    std::env::var_os("NODEGUARD_SOAK").is_some()
}

/// A count or a duration: that of an ordinary run, or that of a soak.
pub fn amount<T>(ordinary: T, soaking: T) -> T {
    if soak() { soaking } else { ordinary }
}
