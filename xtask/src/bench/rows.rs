//! Owns one row of a measurement: how a measuring program reports it, whether it meets its goal, how it is shown.
//! Called by `bench` and by each of its areas.
//! Must never change a figure.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Deserializer, Serialize};

use crate::shell::{command, root, say};

/// One line of the table, as a measuring program prints it: a JSON array of these is all of its output.
#[derive(Serialize, Deserialize)]
pub(super) struct Row {
    /// What is measured.
    pub(super) what: String,
    unit: String,
    ours: f64,
    /// NaN where a figure stands alone.
    #[serde(deserialize_with = "number")]
    other: f64,
    /// Ours divided by the other.
    #[serde(deserialize_with = "number")]
    ratio: f64,
    /// `at least` or `at most` this ratio.
    pub(super) goal: Option<(String, f64)>,
}

/// JSON has no number for NaN: `null` stands for it.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

impl Row {
    /// Whether the goal is met; NaN meets none.
    pub(super) fn met(&self) -> Option<bool> {
        self.goal
            .as_ref()
            .map(|(sense, goal)| if sense == "at least" { self.ratio >= *goal } else { self.ratio <= *goal })
    }
}

/// Runs a measuring program of the release build; its progress is shown, its output are the rows.
pub(super) fn rows_of(program: &str, words: &[String], quick: bool) -> Result<Vec<Row>> {
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

/// Prints the rows as a table.
pub(super) fn show(rows: &[Row]) {
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
