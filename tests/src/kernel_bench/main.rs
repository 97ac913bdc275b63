//! Owns the kernel bench: what a packet, an edit and a flood cost with the guard and without, each pair in one run, in turns.
//! Called by `cargo xtask bench kernel`, which shows the rows that this prints as JSON.
//! Must never compare figures of different runs, and never send a packet outside the namespaces it made.
//!
//! Reading order: `paths` (a packet's verdict, by test run) -> `edit` (from text to in force, and kernel memory) -> `wire` (established traffic
//! and new connections) -> `flood` (a flood of SYNs, beside the `rivals`).

mod edit;
mod flood;
mod generator;
mod paths;
mod prefixes;
mod rivals;
mod uplink;
mod wire;

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use lab::bench;
use nix::unistd::Pid;

/// How much is done.
#[derive(Clone, Copy)]
struct Amount {
    /// Rounds of everything that takes turns.
    rounds: usize,
    /// Repetitions of a test run.
    repeat: u32,
    /// Seconds of one side in one round, of what goes over the wire.
    seconds: f64,
}

const FULL: Amount = Amount { rounds: 10, repeat: 20_000, seconds: 1.0 };
const QUICK: Amount = Amount { rounds: 3, repeat: 5_000, seconds: 0.2 };

/// A part of the bench.
type Measure = fn(Amount) -> Result<Vec<bench::Row>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (amount, parts) = match words[..] {
        ["serve", work, beside] => {
            undisturbed(true)?;
            return wire::serve(Duration::from_micros(work.parse()?), Path::new(beside));
        }
        ["--quick", ref parts @ ..] => (QUICK, parts.to_vec()),
        ref parts => (FULL, parts.to_vec()),
    };
    let all: [(&str, Measure); 4] =
        [("paths", paths::measure), ("edit", edit::measure), ("wire", wire::measure), ("flood", flood::measure)];
    if let Some(unknown) = parts.iter().find(|part| all.iter().all(|(name, _)| name != *part)) {
        bail!("`{unknown}`? usage: nodeguard-kernel-bench [--quick] [paths] [edit] [wire] [flood]");
    }
    let mut rows = Vec::new();
    for (name, measure) in all.iter().filter(|(name, _)| parts.is_empty() || parts.contains(name)) {
        // What one thread computes is measured undisturbed by what else the machine does; what goes over the wire needs others of its parts.
        undisturbed(matches!(*name, "paths" | "edit"))?;
        rows.extend(measure(amount)?);
    }
    bench::print(&rows)
}

/// Gives the calling thread, and what it starts, precedence over everything ordinary; or takes it back.
fn undisturbed(on: bool) -> Result<()> {
    precedence(Pid::from_raw(0), i32::from(on))
}

/// Gives a thread precedence over all that have less; none has zero.
fn precedence(thread: Pid, priority: i32) -> Result<()> {
    let policy = if priority > 0 { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is ours and lives through the call.
    let result = unsafe { libc::sched_setscheduler(thread.as_raw(), policy, &raw const parameter) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()).context("sched_setscheduler") }
}

/// The object with the test-run entry points.
fn object() -> Result<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/guard-dev.o");
    std::fs::read(&path).with_context(|| format!("{} (run `cargo xtask build-ebpf`)", path.display()))
}
