//! Owns the meaning of a policy: the document, its diagnostics, the ruleset, the judgement on a dial, and the kernel's tables as data.
//! Called by the daemon, by the command line and by the fuzz targets.
//! Must never need a kernel, a runtime or a network: this crate builds and tests with cargo alone.
//!
//! Reading order: `policy_file` -> `document` (strict, with positions) -> `parse` (strict values) -> `compile` -> `ruleset` -> `tables` (the
//! content of the kernel's tables; `host` runs `decide` on it). Also: `diagnostic` (findings with a position), `node_facts` (the node that a
//! document is compiled for), `authorize` (may this address be dialled?), with `refusal`, `special` and `pin`.

pub mod authorize;
pub mod compile;
pub mod diagnostic;
pub mod document;
pub mod node_facts;
mod parse;
pub mod pin;
pub mod policy_file;
pub mod refusal;
pub mod ruleset;
pub mod special;
pub mod tables;
mod yaml_error;
