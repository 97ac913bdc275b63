//! A real cluster on this machine with the guard as its DaemonSet, and what operators do in it, line by line.
//!
//! Reading order: `main` (what stands when) -> `addresses`, `place` (namespaces, cgroups, the packet filter) -> `pki`, `control`, `node`
//! (Kubernetes) -> `install` (the files of deploy/, pods to try) -> `table` and `checks` (who, what, by which way, expected, seen) -> `stay`
//! (kept for somebody who tries it), `bench` (what the guard costs).

mod addresses;
mod bench;
mod checks;
mod control;
mod install;
mod kubectl;
mod node;
mod pki;
mod place;
mod stay;
mod table;

use std::{
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::{
    control::{Control, Egress},
    install::Cluster,
    kubectl::Kubectl,
    node::Node,
    pki::Pki,
    place::{Place, Where},
    stay::Interrupt,
    table::Table,
};

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
    Converse { beside: PathBuf, guarded: SocketAddr, free: SocketAddr },
    /// A server of the bench, in a pod.
    #[command(hide = true)]
    Serve { beside: PathBuf, guarded: SocketAddr, free: SocketAddr },
    /// What the first process of a node runs.
    #[command(hide = true)]
    Node { name: String, address: String, directory: PathBuf, images: Vec<String> },
}

fn main() -> ExitCode {
    let outcome = start(Args::parse());
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(Args { what, programs, ipv6 }: Args) -> Result<bool> {
    addresses::choose(ipv6)?;
    control::choose(&programs)?;
    match what {
        What::Run { filter } => cluster(filter.as_deref(), Job::Everything),
        What::Demo { stay } => cluster(None, Job::Demo { stay }),
        What::Bench { quick } => bench::bench(quick),
        What::Converse { beside, guarded, free } => bench::converse(&beside, [guarded, free]),
        What::Serve { beside, guarded, free } => bench::serve(&beside, [guarded, free]),
        What::Node { name, address, directory, images } => {
            node::inside(&name, &address, &directory, &images).map(|()| true)
        }
    }
}

/// What the cluster is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Everything,
    Demo { stay: bool },
}

fn cluster(filter: Option<&str>, job: Job) -> Result<bool> {
    if job != (Job::Demo { stay: true }) {
        nix::unistd::alarm::set(u32::try_from(BOUND.as_secs())?);
    }
    let started = Instant::now();
    let place = Place::new()?;
    let interrupt = Interrupt::of(&place)?;
    let pki = Pki::new(&place)?;
    let outcome = run(&place, &pki, filter, job, &interrupt, started);
    interrupt.let_it_end();
    if let Err(error) = &outcome {
        keep_logs(&place).with_context(|| format!("{error:#}"))?;
    }
    outcome
}

fn run(
    place: &Place,
    pki: &Pki,
    filter: Option<&str>,
    job: Job,
    interrupt: &Interrupt,
    started: Instant,
) -> Result<bool> {
    let mut control = Control::start(place, pki, Egress::Grpc)?;
    say(&format!("control plane after {:.0?}", started.elapsed()))?;
    let mut node = Node::start(place, pki, Where::Node, &install::images(&[install::HOOK])?)?;
    let kubectl = Kubectl::new(place, pki)?;
    let cluster = Cluster { place, kubectl: &kubectl };
    cluster.access()?;
    cluster.node_ready(node::NAME, &mut node)?;
    say(&format!("node ready after {:.0?}\n", started.elapsed()))?;
    let mut table = Table::new(filter)?;
    if job == Job::Everything {
        checks::drop_in::example(&cluster, &mut table)?;
    }
    cluster.install_guard()?;
    cluster.pods(install::PODS)?;
    say(&format!("guard and pods ready after {:.0?}", started.elapsed()))?;

    match job {
        Job::Everything => checks::all(&cluster, &mut control, &mut node, pki, &mut table)?,
        Job::Demo { .. } => checks::demo(&cluster, &mut table)?,
    }
    let (expected, other) = table.sum()?;
    if job == (Job::Demo { stay: true }) {
        stay::try_it(place)?;
        while !interrupt.came(Duration::from_secs(1)) {
            control.check()?;
            node.check()?;
        }
        return Ok(other == 0);
    }
    // In the words of `cargo test`, which the task adds up.
    say(&format!("test result: {expected} passed; {other} failed; 0 ignored; finished in {:.0?}", started.elapsed()))?;
    if other > 0 {
        keep_logs(place)?;
    }
    Ok(other == 0 && expected > 0)
}

/// Copies the logs to where they outlive the cluster.
fn keep_logs(place: &Place) -> Result<()> {
    let kept: PathBuf = lab::lab::target()?.with_file_name("cluster").join("logs");
    std::fs::create_dir_all(&kept)?;
    for part in ["", node::NAME, node::SECOND_NAME] {
        for entry in std::fs::read_dir(place.directory.join(part)).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let name = format!("{part}{}{}", if part.is_empty() { "" } else { "-" }, entry.file_name().display());
                std::fs::copy(entry.path(), kept.join(name))?;
            }
        }
    }
    say(&format!("the logs are in {}", kept.display()))
}

/// A line on standard output.
pub(crate) fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
