//! The agent against the real proxy-server: bytes, certificates, restarts.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::wildcard_enum_match_arm,
    reason = "a test panics and prints figures"
)]

mod audit;
mod beside;
mod blackhole;
mod bytes;
mod certificates;
mod dropin;
mod hostile;
mod http_proxy;
mod isolation;
mod last_hop;
mod load;
mod names;
mod pods;
mod releases;
mod restart;
mod rotation;
mod servers;
mod services;
mod shutdown;
mod trust;
mod upstream;

use anyhow::Result;
use lab::{
    bare::{Place, SERVER, Who},
    certs::{Certs, ServerCert},
    isolated::isolated,
};

/// Whether counts and durations are the full ones.
fn soak() -> bool {
    std::env::var_os("NODEGUARD_SOAK").is_some()
}

/// Runs in namespaces of its own, with certificates; loopback also has these addresses.
fn in_place(more: &[&str], code: impl AsyncFnOnce(&mut Place) -> Result<()> + Send) {
    let directory = tempfile::tempdir().unwrap();
    let addresses: Vec<&str> = [SERVER, Who::Ours.address()].iter().chain(more).copied().collect();
    isolated(&addresses, || {
        let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most)?;
        let mut place = Place { directory: directory.path().to_path_buf(), certs: Certs::new(directory.path())? };
        place.certs.server(ServerCert::Good)?;
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(code(&mut place))
    })
    .unwrap();
}
