//! Every developer task, one file a task. `cargo xtask help` lists them.

mod bench;
mod build_ebpf;
mod checksum;
mod cluster;
mod demo;
mod fuzz;
mod image;
mod kernels;
mod lint;
mod oci;
mod release;
mod setup;
mod shell;
mod stamp;
mod tar_of;
mod test;
mod tools;
mod upstream;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// Developer tasks of Nodeguard.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what is missing on a fresh Debian 12 machine; on any other system, prints what to install.
    Setup,
    /// Builds the kernel objects into target/bpf.
    BuildEbpf {
        /// Builds them even if no source changed.
        #[arg(long)]
        force: bool,
    },
    /// Shows the main job in a lab of network namespaces: every attempt, what became of it, whether that was expected.
    Demo {
        /// Keeps the lab running and prints commands to try.
        #[arg(long)]
        stay: bool,
        /// In a real cluster on this machine instead: kube-apiserver, kubelet, containerd, the guard as its DaemonSet.
        #[arg(long)]
        cluster: bool,
        #[command(flatten)]
        options: demo::Options,
    },
    /// Writes the guard's container image, an OCI archive, into target/image.
    Image,
    /// Writes the files of a release into dist/: binary, image, manifests, bill of materials, changes, checksums.
    Release {
        /// Builds also with changes that are not committed.
        #[arg(long)]
        dirty: bool,
    },
    /// Runs the tests: lint, unit, kernel, kernels, policy, tunnel, lab; all of these without an area. `cluster` runs by name alone:
    /// it builds a whole Kubernetes first.
    Test {
        /// One area only.
        area: Option<test::Area>,
        /// Only the tests whose name holds this.
        filter: Option<String>,
        #[command(flatten)]
        options: demo::Options,
    },
    /// The same tests at full counts and durations, for a release.
    Soak {
        /// One area only.
        area: Option<test::Area>,
        /// Only the tests whose name holds this.
        filter: Option<String>,
        #[command(flatten)]
        options: demo::Options,
    },
    /// Measures this project against what it takes the place of, in one run, and shows the ratios.
    Bench {
        /// One area only.
        area: Option<bench::Area>,
        /// Fails where a goal is missed.
        #[arg(long)]
        check: bool,
        /// One round of everything: shows orders of magnitude.
        #[arg(long)]
        quick: bool,
        /// Writes the rows to a file, too.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        #[command(flatten)]
        options: demo::Options,
    },
}

fn main() -> ExitCode {
    let result = match Args::parse().task {
        Task::Setup => setup::setup(setup::For::Test),
        Task::BuildEbpf { force } => build_ebpf::build_ebpf(force),
        Task::Demo { stay, cluster: false, .. } => demo::demo(stay),
        Task::Demo { stay, cluster: true, options } => demo::cluster(stay, options),
        Task::Image => image::image(),
        Task::Release { dirty } => release::release(dirty),
        Task::Test { area, filter, options } => test::test(area, filter.as_deref(), options),
        Task::Soak { area, filter, options } => test::soak(area, filter.as_deref(), options),
        Task::Bench { area, check, quick, json, options } => bench::bench(area, check, quick, json.as_deref(), options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            shell::complain(format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
