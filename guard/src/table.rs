//! Owns tables as kubectl prints them: upper-case titles, columns three spaces apart, no boxes.
//! Called by every command that shows a list.
//! Must never colour or wrap: the output is read by people and by `awk`.

use std::{
    io::{self, Write},
    time::SystemTime,
};

/// A table that is being filled.
pub struct Table {
    rows: Vec<Vec<String>>,
    spaced: bool,
}

impl Table {
    /// A table with these titles and an empty line before it.
    pub fn new(titles: &[&str]) -> Table {
        Table { rows: vec![titles.iter().map(|title| (*title).to_owned()).collect()], spaced: true }
    }

    /// The same without the empty line.
    pub fn bare(titles: &[&str]) -> Table {
        Table { spaced: false, ..Table::new(titles) }
    }

    /// Adds a row. An empty cell is shown as `-`.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }).collect());
    }

    /// Writes it; nothing where there are no rows.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.rows.len() == 1 {
            return Ok(());
        }
        if self.spaced {
            writeln!(out)?;
        }
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}   "));
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// How long ago an RFC 3339 time was, as kubectl says it: `42s`, `5m13s`, `3h7m`, `2d4h`.
pub fn age(since: &str) -> String {
    let Ok(since) = since.parse::<jiff::Timestamp>() else { return since.to_owned() };
    let now = jiff::Timestamp::try_from(SystemTime::now()).unwrap_or(since);
    ago(std::time::Duration::from_secs(u64::try_from(now.as_second() - since.as_second()).unwrap_or(0)))
}

/// A duration, as kubectl writes ages.
pub fn ago(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{}s", seconds % 60),
        3600..86_400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_empty_cells_show() {
        let mut table = Table::bare(&["NAME", "MODE"]);
        table.row(["kubelet".to_owned(), "Enforce".to_owned()]);
        table.row(["w".to_owned(), String::new()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "NAME      MODE\nkubelet   Enforce\nw         -\n");
    }

    #[test]
    fn ages_read_like_kubectls() {
        let ago = |seconds: i64| {
            let now = jiff::Timestamp::try_from(SystemTime::now()).unwrap();
            age(&jiff::Timestamp::from_second(now.as_second() - seconds).unwrap().to_string())
        };
        assert_eq!((ago(313).as_str(), ago(11_220).as_str(), ago(187_200).as_str()), ("5m13s", "3h7m", "2d4h"));
    }
}
