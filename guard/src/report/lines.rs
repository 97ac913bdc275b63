//! Owns writing lines and JSON for people and programs: what others wrote in them is shown and does nothing.
//! Called by every command and by the tables.
//! Must never let foreign text end a line, steer a terminal or change the order of reading.

use std::{
    fmt,
    io::{self, Write},
};

use guard_policy::visible::{acts, visible, visible_lines};
use serde::Serialize;

/// Writes one line.
pub fn line(out: &mut dyn Write, text: fmt::Arguments<'_>) -> io::Result<()> {
    writeln!(out, "{}", visible(&text.to_string()))
}

/// Writes a text of several lines. Only text whose line ends are our own may be written with it.
pub fn lines(out: &mut dyn Write, text: &str) -> io::Result<()> {
    writeln!(out, "{}", visible_lines(text))
}

/// Writes a value as JSON. Characters that act are escaped as JSON does it, so a program reads the same value.
pub fn json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    // Outside of its strings, JSON has no such character but the line ends.
    for character in serde_json::to_string_pretty(value)?.chars() {
        if acts(character) && character != '\n' {
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
        } else {
            write!(out, "{character}")?;
        }
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_is_one_line() {
        let mut out = Vec::new();
        line(&mut out, format_args!("Daemon: {}", "\u{1b}[2J\nHolding: yes")).unwrap();
        lines(&mut out, "a\u{7}\nb").unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "Daemon: \\u{1b}[2J\\nHolding: yes\na\\u{7}\nb\n");
    }

    proptest! {
        #[test]
        fn json_is_the_same_value_and_does_nothing(text in any::<String>(), more in "[\u{80}-\u{9f}\u{2028}-\u{202e}\u{e0001}\n]{0,8}") {
            let value = serde_json::json!({ "text": [text, more] });
            let mut out = Vec::new();
            json(&mut out, &value).unwrap();
            let written = String::from_utf8(out).unwrap();
            prop_assert!(!written.chars().any(|character| acts(character) && character != '\n'));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), value);
        }
    }
}
