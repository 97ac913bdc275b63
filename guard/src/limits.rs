//! Owns the limits of the tunnel half: flags, defaults, and what they mean together.
//! Called by `args` (the flags), `config` (resolves them), `budget`, `dial` and `session` (keep to them).
//! Must never be unlimited by default: the control plane, or whoever took it over, decides how much comes.

use std::time::Duration;

use clap::Args;

use crate::flags::duration;

/// What the control plane may use of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that may wait for one backend whatever it does.
    pub connection: usize,
    /// Bytes that may wait for all backends together.
    pub memory: usize,
    /// How long bytes may wait for a backend that takes none.
    pub stall: Duration,
    /// Dials under way at once, of all streams.
    pub dials: usize,
    /// Dials under way at once, of one stream.
    pub dials_per_stream: usize,
    /// How long a dial may take, its name's resolution included.
    pub dial: Duration,
    /// Connections open at once.
    pub connections: usize,
}

/// The limits as flags.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Limits of the tunnel")]
pub struct LimitArgs {
    /// How many bytes may wait for one backend in any case. One that reads may have more while --memory-budget has room.
    #[arg(long, value_parser = size, default_value = "8MiB", value_name = "SIZE")]
    pub connection_budget: usize,
    /// How many bytes may wait for all backends together.
    #[arg(long, value_parser = size, default_value = "256MiB", value_name = "SIZE")]
    pub memory_budget: usize,
    /// How long bytes may wait for a backend that takes none of them. Then its connection is reset, and no other.
    #[arg(long, value_parser = duration, default_value = "30s", value_name = "TIME")]
    pub stall_timeout: Duration,
    /// How many dials may be under way at once.
    #[arg(long, default_value_t = 1024, value_name = "COUNT")]
    pub dial_limit: usize,
    /// How many dials of one proxy-server may be under way at once.
    #[arg(long, default_value_t = 512, value_name = "COUNT")]
    pub dial_limit_per_server: usize,
    /// How long a dial may take, the resolution of its name included.
    #[arg(long, value_parser = duration, default_value = "5s", value_name = "TIME")]
    pub dial_timeout: Duration,
    /// How many connections may be open at once.
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

impl Default for Limits {
    /// The defaults of the flags.
    fn default() -> Limits {
        Limits {
            connection: 8 << 20,
            memory: 256 << 20,
            stall: Duration::from_secs(30),
            dials: 1024,
            dials_per_stream: 512,
            dial: Duration::from_secs(5),
            connections: 65_536,
        }
    }
}

/// A size as Kubernetes writes quantities of bytes, with or without the B: `8MiB`, `8Mi`, `64KiB`, `1GiB`, or bytes.
fn size(text: &str) -> Result<usize, String> {
    let failed = || format!("`{text}` is no size, as in 8MiB, 512KiB or a number of bytes");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: usize = match unit.strip_suffix('B').unwrap_or(unit) {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return Err(failed()),
    };
    let bytes = number.parse::<usize>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(failed)?;
    // Less than the largest message would refuse what a well-behaved server sends.
    if bytes < 1 << 16 { Err(format!("`{text}` is less than 64KiB")) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        limits: LimitArgs,
    }

    #[test]
    fn the_flags_have_the_defaults_and_sizes_are_written_as_kubernetes_does() {
        let parse = |more: &[&str]| {
            Line::try_parse_from(["x"].iter().chain(more)).map(|line| Limits::from(line.limits)).map_err(|e| e.kind())
        };
        assert_eq!(parse(&[]), Ok(Limits::default()));
        let limits = parse(&["--connection-budget=2Mi", "--memory-budget=1GiB", "--stall-timeout=2s"]).unwrap();
        assert_eq!((limits.connection, limits.memory, limits.stall), (2 << 20, 1 << 30, Duration::from_secs(2)));
        // One connection never has more than all of them.
        assert_eq!(parse(&["--memory-budget=1048576"]).unwrap().connection, 1 << 20);
        for wrong in ["", "MiB", "1.5MiB", "8MB", "-1", "1KiB", "99999999999999999999"] {
            assert!(parse(&[&format!("--memory-budget={wrong}")]).is_err(), "{wrong}");
        }
    }
}
