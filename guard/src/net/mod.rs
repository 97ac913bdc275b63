//! Owns how another machine is reached: names, HTTP proxies, TLS, and the addresses of pods.
//! Called by `cluster` and `tunnel`.
//! Must never decide whether it may be reached.

pub mod host_port;
pub mod http_connect;
pub mod http_proxy;
pub mod pods;
pub mod remote_host;
pub(crate) mod server_verifier;
pub mod tls;
pub mod verify;
