//! Owns `cargo xtask demo`: the set-up, then the lab with a running guard.
//! Called as `cargo xtask demo [--cluster] [--stay]`, and by the cluster area of `test`.
//! Must never hide what the lab found: the exit code of the lab is the exit code of the task.

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::{
    cluster::{self, Kubernetes},
    image, setup,
    shell::{MEMBERS, command, find, root, run, say},
};

/// Sets up, builds, and runs the demo.
pub(crate) fn demo(stay: bool) -> Result<()> {
    setup::root_or_say("demo")?;
    setup::setup(setup::For::Lab)?;
    say("building the guard and the lab (a few minutes the first time)");
    let cargo = find("cargo").context("cargo is not in PATH")?;
    let mut build = command(cargo);
    build.args(["build", "--quiet", "--locked"]).args(MEMBERS);
    run(build.args(["--bin", "nodeguard", "--bin", "nodeguard-demo"]))?;
    let mut demo = command(root().join("target/debug/nodeguard-demo"));
    if stay {
        demo.arg("--stay");
    }
    until_it_ended(&mut demo)
}

/// Runs the checks of the cluster lab once; `stay` leaves the cluster running.
pub(crate) fn cluster(stay: bool, options: Options) -> Result<()> {
    setup::root_or_say("demo --cluster")?;
    let mut lab = cluster_lab(options)?;
    lab.arg("demo");
    if stay {
        lab.arg("--stay");
    }
    until_it_ended(&mut lab)
}

/// Runs a lab to its end. Ctrl-c ends the lab: it cleans up, and this waits for it.
fn until_it_ended(lab: &mut std::process::Command) -> Result<()> {
    extern "C" fn nothing(_: nix::libc::c_int) {}
    // A handler instead of SIG_IGN, which the lab would inherit.
    let handler = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing at all.
    unsafe { sigaction(Signal::SIGINT, &handler) }?;
    run(lab)
}

/// What the cluster consists of.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct Options {
    /// With cluster: the minor version of Kubernetes
    #[arg(long, value_name = "MINOR", default_value = "v1.34")]
    kubernetes: Kubernetes,
    /// With cluster: IPv6 only instead of IPv4
    #[arg(long)]
    ipv6: bool,
}

impl Options {
    /// The set-up that builds it.
    pub(crate) fn setup(self) -> setup::For {
        setup::For::Cluster(self.kubernetes)
    }

    /// The options as arguments of the lab.
    pub(crate) fn lab(self) -> Vec<String> {
        let programs = format!("--programs={}", self.kubernetes.folder());
        [programs].into_iter().chain(self.ipv6.then(|| "--ipv6".to_owned())).collect()
    }

    /// The options as arguments of this program.
    pub(crate) fn words(self) -> Vec<String> {
        let minor = self.kubernetes.to_possible_value().map(|value| format!("--kubernetes={}", value.get_name()));
        minor.into_iter().chain(self.ipv6.then(|| "--ipv6".to_owned())).collect()
    }
}

/// Builds everything that the cluster lab needs; returns the command that runs it.
pub(crate) fn cluster_lab(options: Options) -> Result<std::process::Command> {
    setup::setup(options.setup())?;
    say("building the guard's image and the lab (a few minutes the first time)");
    image::guard()?;
    cluster::hook_image()?;
    let mut build = command(find("cargo").context("cargo is not in PATH")?);
    run(build.args(["build", "--quiet", "--locked", "--package", "nodeguard-tests", "--bin", "nodeguard-cluster"]))?;
    let mut lab = command(root().join("target/debug/nodeguard-cluster"));
    lab.args(options.lab());
    Ok(lab)
}
