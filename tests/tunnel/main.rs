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

use std::net::SocketAddr;

use anyhow::Result;
use lab::{
    bare::{Place, SERVER},
    soak,
};

/// The port of a fake server.
const PORT: u16 = 8091;
/// What is dialled through our agent.
const ENDPOINT: &str = "10.0.0.2:7000";

/// A port of the address for servers.
fn at(port: u16) -> SocketAddr {
    SocketAddr::new(SERVER.parse().unwrap(), port)
}

/// Serves port 7000 of every address as an endpoint.
async fn serve_endpoint() -> Result<()> {
    lab::load::serve("0.0.0.0:7000").await
}

/// Runs in namespaces of its own, with certificates; loopback also has these addresses.
fn in_place(more: &[&str], code: impl AsyncFnOnce(&mut Place) -> Result<()> + Send) {
    Place::with(more, code).unwrap();
}
