//! Owns tables as kubectl prints them: upper-case titles, columns three spaces apart, no boxes.
//! Called by every command that shows a list.
//! Must never colour or wrap, nor write a cell as it came: the output is read by people and by `awk`, and others wrote some of it.

use std::io::{self, Write};

use guard_policy::visible::visible;

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

    /// Adds a row. An empty cell is shown as `-`, and a character that acts as its escape.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let shown = |cell: String| if cell.is_empty() { "-".to_owned() } else { visible(&cell).into_owned() };
        self.rows.push(cells.into_iter().map(shown).collect());
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
    fn a_cell_neither_ends_its_row_nor_steers_the_terminal() {
        let mut table = Table::bare(&["REQUESTED", "REASON"]);
        table.row(["\u{1b}[2J\nkubelet   Enforce\u{202e}".to_owned(), "malformed".to_owned()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("\\u{1b}[2J\\nkubelet   Enforce\\u{202e}   malformed"), "{text}");
    }
}
