//! Owns the table of checks: each line says who, what, by which way, expected, seen.
//! Called by the main job of the lab, and by the checks of the cluster lab.
//! Must never count a line as expected that was not run.

use std::fmt::Display;

use anyhow::Result;

use crate::bench::print_line as say;

/// The lines so far.
#[derive(Default)]
pub struct Table {
    filter: Option<String>,
    shown: bool,
    expected: usize,
    other: Vec<String>,
}

impl Table {
    /// An empty table that is shown; only lines that hold the filter are run. The default one is not shown and runs all.
    pub fn new(filter: Option<&str>) -> Result<Table> {
        let table = Table { filter: filter.map(str::to_owned), shown: true, ..Table::default() };
        table.line("WHO", "WHAT", "BY", "EXPECTED", "SEEN", "OK")?;
        Ok(table)
    }

    /// Whether the filter may want a line of somebody: what only those lines need is not built otherwise.
    pub fn wants(&self, who: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| who.contains(filter.as_str()) || filter.contains(who))
    }

    /// Runs a check and shows its line. The check says what it saw; details may follow in parentheses.
    pub fn check<Seen: Into<String>>(
        &mut self,
        who: &str,
        what: &str,
        by: impl Display,
        expected: &str,
        check: impl FnOnce() -> Result<Seen>,
    ) -> Result<()> {
        let by = by.to_string();
        if self.filter.as_ref().is_some_and(|filter| !format!("{who} {what} {by}").contains(filter.as_str())) {
            return Ok(());
        }
        let seen = check().map_or_else(|error| format!("error: {error:#}"), Into::into);
        let seen = seen.trim().replace('\n', " ");
        let good = seen == expected || seen.starts_with(&format!("{expected} ("));
        self.line(who, what, &by, expected, &seen, if good { "yes" } else { "NO" })?;
        if good {
            self.expected += 1;
        } else {
            self.other.push(format!("{who}: {what} by {by}: wanted {expected}, saw {seen}"));
        }
        Ok(())
    }

    /// Runs a check that sees what is expected unless it fails.
    pub fn holds(
        &mut self,
        who: &str,
        what: &str,
        by: impl Display,
        expected: &str,
        check: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.check(who, what, by, expected, || check().map(|()| expected))
    }

    /// Prints how many lines were as expected, and the others once more; returns how many were as expected, and the others.
    pub fn sum(&self) -> Result<(usize, &[String])> {
        self.other.iter().try_for_each(|other| say(&format!("  not as expected: {other}")))?;
        say(&format!("\n{} of {} as expected", self.expected, self.expected + self.other.len()))?;
        Ok((self.expected, &self.other))
    }

    fn line(&self, who: &str, what: &str, by: &str, expected: &str, seen: &str, good: &str) -> Result<()> {
        let line = || say(&format!("{who:<22} {what:<44} {by:<24} {expected:<24} {good:<4} {seen}"));
        if self.shown { line() } else { Ok(()) }
    }
}
