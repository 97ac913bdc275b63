//! Owns the kernel half: loading and pinning the programs, bringing a ruleset into the maps, reading back what happened.
//! Called by `app` (run), `status` and `unpin`.
//! Must never write a map outside `apply` and `pinholes`, and never detach anything but on `unpin`.
//!
//! Reading order: `load` (open or adopt the pinned state) -> `plan` (have and want to operations) -> `apply` (carry them out) ->
//! `follow` (cgroups come and go) -> `established` (cut what is no longer admitted) -> `events` (what the programs say) -> `mend` (hold it) -> `edge` (links on the uplinks) -> `pinholes` (one for each dial) -> `unpin`.

pub mod apply;
mod bulk;
pub mod cgroup;
pub mod edge;
mod elements;
pub mod established;
pub mod events;
pub mod follow;
mod held;
pub mod load;
pub mod maps;
mod mend;
pub mod model;
pub mod object;
pub mod pinholes;
pub mod plan;
#[cfg(feature = "ebpf-log")]
mod program_log;
mod shape;
pub(crate) mod sock_diag;
pub(crate) mod sys;
pub mod unpin;
pub mod upgrade;
pub mod usage;
