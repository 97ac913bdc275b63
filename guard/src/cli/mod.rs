//! Owns the command line: flags, what they resolve to, and the commands that answer at once.
//! Called by `main`.
//! Must never leave a default to chance: `config` resolves every one.

pub mod args;
pub mod check_policy;
pub mod config;
pub mod limit_args;
pub mod upstream_flags;
