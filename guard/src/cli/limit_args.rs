//! Owns the flags for the limits of the tunnel half.
//! Called by `args`.
//! Must never be unlimited by default: whoever controls the control plane decides how much traffic arrives.

use std::time::Duration;

use clap::Args;

use crate::{
    dial::limits::Limits,
    sys::units::{buffer_size, duration},
};

/// The flags for the limits.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Limits of the tunnel")]
pub struct LimitArgs {
    /// Bytes that may wait for one backend in any case. A backend that reads may use more while --memory-budget has room.
    #[arg(long, value_parser = buffer_size, default_value = "8MiB", value_name = "SIZE")]
    pub connection_budget: usize,
    /// Bytes that may wait for all backends together.
    #[arg(long, value_parser = buffer_size, default_value = "256MiB", value_name = "SIZE")]
    pub memory_budget: usize,
    /// How long bytes may wait for a backend that does not read. After that, only this backend's connection is reset.
    #[arg(long, value_parser = duration, default_value = "30s", value_name = "TIME")]
    pub stall_timeout: Duration,
    /// Dials that may be in progress at the same time.
    #[arg(long, default_value_t = 1024, value_name = "COUNT")]
    pub dial_limit: usize,
    /// Dials of one proxy-server that may be in progress at the same time.
    #[arg(long, default_value_t = 512, value_name = "COUNT")]
    pub dial_limit_per_server: usize,
    /// How long a dial may take, including name resolution.
    #[arg(long, value_parser = duration, default_value = "5s", value_name = "TIME")]
    pub dial_timeout: Duration,
    /// Connections that may be open at the same time.
    #[arg(long, default_value_t = 65_536, value_name = "COUNT")]
    pub connection_limit: usize,
}

impl From<LimitArgs> for Limits {
    fn from(args: LimitArgs) -> Limits {
        Limits {
            connection: args.connection_budget.min(args.memory_budget),
            memory: args.memory_budget,
            stall: args.stall_timeout,
            dials: args.dial_limit,
            dials_per_stream: args.dial_limit_per_server,
            dial: args.dial_timeout,
            connections: args.connection_limit,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct LimitLine {
        #[command(flatten)]
        limits: LimitArgs,
    }

    #[test]
    fn the_flags_have_the_defaults_and_sizes_are_written_as_kubernetes_does() {
        let parse = |more: &[&str]| {
            LimitLine::try_parse_from(["x"].iter().chain(more))
                .map(|line| Limits::from(line.limits))
                .map_err(|e| e.kind())
        };
        assert_eq!(parse(&[]), Ok(Limits::default()));
        let limits = parse(&["--connection-budget=2Mi", "--memory-budget=1GiB", "--stall-timeout=2s"]).unwrap();
        assert_eq!((limits.connection, limits.memory, limits.stall), (2 << 20, 1 << 30, Duration::from_secs(2)));
        // One connection never gets more than the budget of all connections.
        assert_eq!(parse(&["--memory-budget=1048576"]).unwrap().connection, 1 << 20);
        for wrong in ["", "MiB", "1.5MiB", "8MB", "-1", "1KiB", "99999999999999999999"] {
            assert!(parse(&[&format!("--memory-budget={wrong}")]).is_err(), "{wrong}");
        }
    }
}
