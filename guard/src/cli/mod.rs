//! Owns the command line: its flags, the configuration that they resolve to, the log, and the commands that answer at once.
//! Called by `main` and by `daemon`.
//! Must never leave a default open: `config` resolves each one.

pub mod args;
pub mod check_policy;
pub mod config;
pub mod limit_args;
pub mod log;
pub mod remove_pins;
pub mod show_status;
pub mod upstream_flags;
