//! Owns what a policy says and means: the document, its diagnostics, the ruleset, the judgement on a dial, and the kernel's tables as data.
//! Called by the daemon, by the command line and by the fuzz targets.
//! Must never need a kernel, a runtime or a network: this crate builds and tests with cargo alone.
//!
//! Reading order: `policy_file` -> `document` (strict, with positions) -> `parse` (strict values) -> `compile` -> `ruleset` -> `tables` (what the
//! kernel holds of it; `host` runs `decide` on it). Beside it: `diagnostic` (what is wrong, and where), `node_facts` (what a document is
//! compiled for), `authorize` (may a dial go there?), with `refusal`, `special` and `pin`.

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
