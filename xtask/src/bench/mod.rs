//! Owns `cargo xtask bench`: builds for release, runs an area's measurements, shows them as one table with ratios and goals.
//! Called as `cargo xtask bench [AREA] [--check] [--quick] [--json FILE]`.
//! Must never compare figures of two runs: each row has ours and the other of the same one.

mod cluster;
mod kernel;
mod tunnel;

use std::{fs, path::Path, process::Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{
    demo, setup,
    shell::{command, find, root, run, say},
};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Area {
    /// What a packet's verdict and an edit of the policy cost.
    Kernel,
    /// This agent and the upstream one under the same real proxy-server.
    Tunnel,
    /// Exec, logs and traffic between pods in a real cluster. By name alone: it builds a whole Kubernetes first.
    Cluster,
}

/// One line of the table, as a measuring program prints it: a JSON array of these is all of its output.
#[derive(Serialize, Deserialize)]
pub(crate) struct Row {
    what: String,
    unit: String,
    ours: f64,
    /// No number where a figure stands alone.
    #[serde(deserialize_with = "number")]
    other: f64,
    /// Ours divided by the other.
    #[serde(deserialize_with = "number")]
    ratio: f64,
    /// `at least` or `at most` this ratio.
    goal: Option<(String, f64)>,
}

/// JSON has no word for what is no number.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

impl Row {
    /// Whether the goal is met; a ratio that is no number meets none.
    fn met(&self) -> Option<bool> {
        self.goal
            .as_ref()
            .map(|(sense, goal)| if sense == "at least" { self.ratio >= *goal } else { self.ratio <= *goal })
    }
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
    // The cluster has a set-up of its own, and its guard is the image's.
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

/// Runs a measuring program of the release build; its progress is shown, its output are the rows.
fn rows_of(program: &str, words: &[String], quick: bool) -> Result<Vec<Row>> {
    let mut command = command(root().join("target/release").join(program));
    let output = command
        .args(words)
        .args(quick.then_some("--quick"))
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} failed ({})", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("what {program} printed"))
}

fn show(rows: &[Row]) {
    let width = rows.iter().map(|row| row.what.chars().count()).max().unwrap_or(4);
    say(format!(
        "{:<width$}  {:>9}  {:>9}  {:<6}  {:>6}  {:<14}  OK",
        "WHAT", "OURS", "OTHER", "UNIT", "RATIO", "GOAL"
    ));
    for row in rows {
        let goal = row.goal.as_ref().map_or_else(|| "-".to_owned(), |(sense, goal)| format!("{sense} {goal}"));
        let ok = match row.met() {
            None => "-",
            Some(true) => "yes",
            Some(false) => "NO",
        };
        let text = |number: f64| if number.is_nan() { "-".to_owned() } else { format!("{number:.2}") };
        let (Row { what, unit, .. }, [ours, other]) = (row, [row.ours, row.other].map(text));
        let ratio = if row.ratio.is_nan() { "-".to_owned() } else { format!("{:.3}", row.ratio) };
        say(format!("{what:<width$}  {ours:>9}  {other:>9}  {unit:<6}  {ratio:>6}  {goal:<14}  {ok}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_or_not_and_nonsense_meets_none() {
        let row = |ratio: f64, goal: Option<(&str, f64)>| Row {
            what: "w".into(),
            unit: "u".into(),
            ours: 1.0,
            other: 1.0,
            ratio,
            goal: goal.map(|(sense, goal)| (sense.to_owned(), goal)),
        };
        assert_eq!(row(2.0, Some(("at least", 2.0))).met(), Some(true));
        assert_eq!(row(1.9, Some(("at least", 2.0))).met(), Some(false));
        assert_eq!(row(0.4, Some(("at most", 0.4))).met(), Some(true));
        assert_eq!(row(f64::NAN, Some(("at most", 0.4))).met(), Some(false));
        assert_eq!(row(1.0, None).met(), None);
    }
}
