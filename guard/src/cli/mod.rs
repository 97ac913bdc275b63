//! Owns the command line: its flags, the configuration that they resolve to, and the commands that need no daemon.
//! Called by `main` and by `daemon`.
//! Must never leave a default open: `config` resolves each one.

pub mod args;
pub mod check_policy;
pub mod config;
pub mod limit_args;
pub mod upstream_flags;
