//! Owns the command line of the developer tasks, one file a task. `cargo xtask help` lists them.
//! Called as `cargo xtask TASK`.
//! Must never do a task itself: it parses, calls, and turns the outcome into an exit code.

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
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing on a fresh Debian 12 machine; on any other system, print what to install
    Setup,
    /// Build the kernel objects into target/bpf
    BuildEbpf {
        /// Build them even if no source has changed
        #[arg(long)]
        force: bool,
    },
    /// Show the main job in a lab of network namespaces: each connection attempt, its result, and whether that is expected
    Demo {
        /// Keep the lab running and print commands to try
        #[arg(long)]
        stay: bool,
        /// Use a real cluster on this machine instead: kube-apiserver, kubelet, containerd, and the guard as its DaemonSet
        #[arg(long)]
        cluster: bool,
        #[command(flatten)]
        options: demo::Options,
    },
    /// Write the guard's container image, an OCI archive, into target/image
    Image,
    /// Write the files of a release into dist/: binary, image, manifests, bill of materials, changes, checksums
    Release {
        /// Build even if there are changes that are not committed
        #[arg(long)]
        dirty: bool,
    },
    /// Run the tests; without an area, all areas except cluster
    Test {
        /// Run this area only
        area: Option<test::Area>,
        /// Run only the tests and lint checks whose name contains this
        filter: Option<String>,
        #[command(flatten)]
        options: demo::Options,
    },
    /// Run the same tests at full counts and durations, for a release: with the cluster, and each fuzz target for a minute
    Soak {
        /// Run this area only
        area: Option<test::Area>,
        /// Run only the tests and lint checks whose name contains this
        filter: Option<String>,
        #[command(flatten)]
        options: demo::Options,
    },
    /// Measure the guard and what it replaces in one run, and show the ratios
    Bench {
        /// Measure this area only
        area: Option<bench::Area>,
        /// Fail if a goal is missed
        #[arg(long)]
        check: bool,
        /// One short round of everything: shows orders of magnitude only
        #[arg(long)]
        quick: bool,
        /// Also write the rows to this file
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
