//! Owns the check that the walks of ARCHITECTURE.md name files and functions that exist.
//! Called by `lint`.
//! Must never accept a step without a function: a walk is a list of calls, not of files.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::settle;

/// The page, and the section whose numbered lists are the walks.
const PAGE: &str = "ARCHITECTURE.md";
const SECTION: &str = "## The walks";

/// One step: a file below the root, and a function in it.
#[derive(Debug, PartialEq, Eq)]
struct Step<'a> {
    line: usize,
    file: &'a str,
    function: &'a str,
}

/// Every step of every walk is a function of that name in that file.
pub(super) fn walks(root: &Path) -> Result<()> {
    let page = fs::read_to_string(root.join(PAGE)).context(PAGE)?;
    let mut found = Vec::new();
    let steps = steps(&page, &mut found);
    if steps.is_empty() {
        found.push(format!("{PAGE}: no walk under `{SECTION}`"));
    }
    for Step { line, file, function } in steps {
        match fs::read_to_string(root.join(file)) {
            Ok(text) if defines(&text, function) => {}
            Ok(_) => found.push(format!("{PAGE}:{line}: {file} has no function `{function}`")),
            Err(error) => found.push(format!("{PAGE}:{line}: {file}: {error}")),
        }
    }
    settle(&found)
}

/// The numbered lines of the section. One that does not begin with a file and a function is reported.
fn steps<'a>(page: &'a str, found: &mut Vec<String>) -> Vec<Step<'a>> {
    let section = page.lines().enumerate().skip_while(|(_, text)| *text != SECTION).skip(1);
    let section = section.take_while(|(_, text)| !text.starts_with("## "));
    let mut steps = Vec::new();
    for (index, text) in section {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let Some(item) = text.get(digits..).and_then(|rest| rest.strip_prefix(". ")).filter(|_| digits > 0) else {
            continue;
        };
        let mut quoted = item.split('`');
        match (quoted.next(), quoted.next(), quoted.next(), quoted.next()) {
            (Some(""), Some(file), Some(" "), Some(function)) => steps.push(Step { line: index + 1, file, function }),
            _ => found.push(format!("{PAGE}:{}: a step begins with `file` `function`", index + 1)),
        }
    }
    steps
}

/// Whether a source file defines a function of this name.
fn defines(text: &str, function: &str) -> bool {
    let head = format!("fn {function}");
    text.match_indices(&head).any(|(at, _)| {
        let before = text.get(..at).and_then(|before| before.chars().next_back());
        let after = text.get(at + head.len()..).and_then(|after| after.chars().next());
        before.is_none_or(char::is_whitespace) && matches!(after, Some('(' | '<'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_a_file_and_a_function() {
        let page = "## Before\n1. `a` `b`\n## The walks\n### A\n1. `x.rs` `go`: first\n2. then\n   more\n## After\n1. `c` `d`\n";
        let mut found = Vec::new();
        assert_eq!(steps(page, &mut found), [Step { line: 5, file: "x.rs", function: "go" }]);
        assert_eq!(found, ["ARCHITECTURE.md:6: a step begins with `file` `function`"]);
    }

    #[test]
    fn a_function_is_found_by_its_whole_name() {
        let text = "impl X {\n    pub(crate) async fn take<T>(edit: T) {}\n}\nfn given() {}\n";
        assert!(defines(text, "take") && defines(text, "given"));
        assert!(!defines(text, "tak") && !defines(text, "ive") && !defines(text, "X"));
    }
}
