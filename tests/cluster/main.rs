//! A real cluster on this machine with the guard as its DaemonSet, and what operators do in it, line by line.
//!
//! Reading order: `main` (what runs when) -> `checks` (their order) and a file for each kind of check -> `stay` (kept for somebody who tries it).
//! The cluster itself is a library: `lab::cluster`.

mod checks;
mod direct;
mod drop_in;
mod edge;
mod edits;
mod facts;
mod operators;
mod refused;
mod services;
mod stay;
mod two;
mod undo;
mod updates;

use std::{
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use lab::cluster::{self, Cluster, Place, Table, keep_logs, say};

/// A run that hangs ends by itself after this; with it end all processes of the cluster.
const BOUND: Duration = Duration::from_secs(45 * 60);

/// The cluster lab.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// The folder of `target` with the programs of Kubernetes.
    #[arg(long, global = true, default_value = "cluster")]
    programs: String,
    /// IPv6 alone instead of IPv4.
    #[arg(long, global = true)]
    ipv6: bool,
}

#[derive(Subcommand)]
enum What {
    /// Starts a cluster, runs the checks, ends it.
    Run {
        /// Only checks that hold this.
        filter: Option<String>,
    },
    /// Starts a cluster and shows the main job.
    Demo {
        /// Keeps it and prints what to try.
        #[arg(long)]
        stay: bool,
    },
    /// Measures what the guard costs, and prints rows for `cargo xtask bench`.
    Bench {
        /// One round of everything.
        #[arg(long)]
        quick: bool,
    },
    /// A client of the bench, in a pod.
    #[command(hide = true)]
    Converse { beside: PathBuf, guarded: SocketAddr, free: SocketAddr, round: usize },
    /// A server of the bench, in a pod.
    #[command(hide = true)]
    Serve { beside: PathBuf, guarded: SocketAddr, free: SocketAddr },
    /// The first process of a node.
    #[command(hide = true)]
    Node { name: String, address: String, directory: PathBuf, images: Vec<String> },
}

fn main() -> ExitCode {
    match start(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(Args { what, programs, ipv6 }: Args) -> Result<bool> {
    cluster::choose_family(ipv6)?;
    cluster::choose_programs(&programs)?;
    match what {
        What::Run { filter } => return with_cluster(filter.as_deref(), Job::Everything),
        What::Demo { stay } => return with_cluster(None, Job::Demo { stay }),
        What::Bench { quick } => cluster::bench(quick)?,
        What::Converse { beside, guarded, free, round } => cluster::converse(&beside, [guarded, free], round)?,
        What::Serve { beside, guarded, free } => cluster::serve(&beside, [guarded, free])?,
        What::Node { name, address, directory, images } => cluster::run_node(&name, &address, &directory, &images)?,
    }
    Ok(true)
}

/// What the cluster is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Everything,
    Demo { stay: bool },
}

fn with_cluster(filter: Option<&str>, job: Job) -> Result<bool> {
    if job != (Job::Demo { stay: true }) {
        nix::unistd::alarm::set(u32::try_from(BOUND.as_secs())?);
    }
    let place = Arc::new(Place::new()?);
    stay::remove_on_interrupt(&place)?;
    let outcome = run(&place, filter, job);
    stay::let_it_end();
    if let Err(error) = &outcome {
        keep_logs(&place).with_context(|| format!("{error:#}"))?;
    }
    outcome
}

fn run(place: &Arc<Place>, filter: Option<&str>, job: Job) -> Result<bool> {
    let started = Instant::now();
    let mut cluster = Cluster::start(place, &[checks::HOOK])?;
    say(&format!("node ready after {:.0?}\n", started.elapsed()))?;
    let mut table = Table::new(filter)?;
    if job == Job::Everything {
        drop_in::example(&cluster, &mut table)?;
    }
    cluster.install_guard()?;
    cluster.pods(include_str!("files/pods.yaml"))?;
    say(&format!("guard and pods ready after {:.0?}", started.elapsed()))?;

    match job {
        Job::Everything => checks::all(&mut cluster, &mut table)?,
        Job::Demo { .. } => checks::demo(&cluster, &mut table)?,
    }
    let (expected, other) = table.sum().map(|(expected, other)| (expected, other.len()))?;
    if job == (Job::Demo { stay: true }) {
        stay::try_it(place, other == 0)?;
        loop {
            cluster.check()?;
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    // In the words of `cargo test`, which the task adds up.
    say(&format!("test result: {expected} passed; {other} failed; 0 ignored; finished in {:.0?}", started.elapsed()))?;
    if other > 0 {
        keep_logs(place)?;
    }
    Ok(other == 0 && expected > 0)
}
