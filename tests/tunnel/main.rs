//! The agent against the real proxy-server: bytes, certificates, restarts.

mod bytes;
mod certificates;
mod restart;
