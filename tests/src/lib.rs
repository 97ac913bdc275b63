//! Owns what all tests and benches stand on: the lab, packets, benches, and the parts that they share.
//! Called by the tests, the demo, the benches, the cluster lab and the guest of the tried kernels.
//! Must never send a packet outside the namespaces it made, and never leave anything behind.
//!
//! - [`lab`]: network namespaces with a control plane, a node, a pod, a stranger, an allowed and an excepted peer; in them the real
//!   proxy-server, a TLS kubelet stand-in, pod servers and the guard. `main_job` is the demo, line by line.
//! - [`packets`]: real packets built byte by byte, sent over a wire, and what becomes of each shape.
//! - [`mod@bench`]: rows, medians and rounds of a bench, and the traffic that is measured.
//! - [`net::isolated`] is the small way, loopback only; in it [`bare`] (agents without a kernel half), [`load`] (what they dial, and what
//!   the control plane does), [`servers`] (whom they connect to, and what is on the way), [`kube`] (the API server that is asked about tokens,
//!   leases and Services).
//! - [`cluster`]: a whole Kubernetes on this machine with the guard as its DaemonSet.
//! - [`agree`] compares the kernel's decisions with the host's.
//! - Shared: [`process`], [`certs`], [`sweep`], [`table`].

pub mod agree;
pub mod bare;
pub mod bench;
pub mod certs;
pub mod cluster;
pub mod kube;
pub mod lab;
pub mod load;
pub mod packets;
pub mod process;
pub mod servers;
pub mod sweep;
pub mod table;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use bench::traffic;
pub use lab::{client, daemon, helper, main_job, net};
pub use packets::{judged, shapes, wire};

/// Locks what tasks share: whoever changes it does so in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this is a soak (`cargo xtask soak`): full counts and durations.
pub fn soak() -> bool {
    std::env::var_os("NODEGUARD_SOAK").is_some()
}

/// A count or a duration: that of an ordinary run, or that of a soak.
pub fn amount<T>(ordinary: T, soaking: T) -> T {
    if soak() { soaking } else { ordinary }
}
