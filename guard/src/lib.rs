//! Owns the daemon and the command line of Nodeguard, as a library under a thin `main`.
//! Called by `main.rs` and by the integration tests.
//! Must never be published: its only interface is the `nodeguard` command.
//!
//! Modules in reading order: `args` and `flags` (typed, unresolved) -> `config` (nothing left optional) -> `app` (builds the parts,
//! waits, drains; `agent` is the same without the kernel half) -> `policy` (file to ruleset) -> `kernel` (ruleset to maps) -> `tunnel` (stream to dial) -> `dial` -> `authorize` ->
//! `connections` -> `queue` (what waits for a backend, within `budget` and `limits`) -> `relay` -> `drain`, `admin`, `metrics`, `konnectivity` (upstream's metrics).

pub mod admin;
pub mod advertise;
pub mod agent;
pub mod app;
pub mod args;
pub mod audit;
pub mod authorize;
pub mod budget;
mod causes;
mod changes;
pub mod config;
pub mod connections;
pub mod dial;
pub mod dialling;
pub mod drain;
pub mod edge;
pub mod flags;
pub mod footprint;
mod gate;
pub mod hello;
mod hold;
pub mod kernel;
pub mod konnectivity;
pub mod kubelet;
pub mod limits;
mod lock;
pub mod metrics;
pub mod node;
pub mod pods;
pub mod policy;
pub mod queue;
pub mod relay;
pub mod services;
pub mod snapshot;
pub mod status;
pub mod table;
mod texts;
pub mod tunnel;
pub mod usage;
