//! Owns `cargo xtask bench`: builds for release, runs an area's measurements, shows them as one table with ratios and goals.
//! Called as `cargo xtask bench [AREA] [--check] [--quick] [--json FILE]`.
//! Must never compare figures of two runs: each row has ours and the other of the same one.

mod cluster;
mod kernel;
mod rows;
mod tunnel;

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use self::rows::show;
use crate::{
    demo, setup,
    shell::{command, find, run, say},
};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Area {
    /// The cost of a verdict on a packet, and of an edit of the policy
    Kernel,
    /// The guard's agent and the upstream agent, with the same real proxy-server
    Tunnel,
    /// Exec, logs and traffic between pods in a real cluster; only by name, because it first builds a whole Kubernetes
    Cluster,
}

/// Measures one area or all.
pub(crate) fn bench(
    area: Option<Area>,
    check: bool,
    quick: bool,
    json: Option<&Path>,
    options: demo::Options,
) -> Result<()> {
    setup::root_or_say("bench")?;
    // The cluster has a set-up of its own, and runs the guard of the image.
    let cluster_alone = area == Some(Area::Cluster);
    setup::setup(if cluster_alone { options.setup() } else { setup::For::Test })?;
    say("building for release (some minutes the first time)");
    let mut build = command(find("cargo").context("cargo is not in PATH")?);
    build.args(["build", "--quiet", "--release", "--locked", "--package", "nodeguard-tests"]);
    run(if cluster_alone {
        build.args(["--bin", "nodeguard-cluster"])
    } else {
        build.args(["--bins", "--package", "nodeguard"])
    })?;
    let mut all = Vec::new();
    let wanted = |each: &&Area| area.map_or(**each != Area::Cluster, |area| area == **each);
    for each in Area::value_variants().iter().filter(wanted) {
        say(format!("\n== {}", each.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())));
        let rows = match each {
            Area::Kernel => kernel::measure(quick)?,
            Area::Tunnel => tunnel::measure(quick)?,
            Area::Cluster => cluster::measure(quick, options)?,
        };
        show(&rows);
        all.extend(rows);
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
    }
    let missed: Vec<&str> = all.iter().filter(|row| row.met() == Some(false)).map(|row| row.what.as_str()).collect();
    let goals = all.iter().filter(|row| row.goal.is_some()).count();
    say(format!("\ngoals: {} of {goals} met", goals - missed.len()));
    if check && !missed.is_empty() {
        bail!("missed: {}", missed.join("; "));
    }
    Ok(())
}
