//! Owns reading CHANGELOG.md: the section of one version.
//! Called by `release`.
//! Must never return an empty section: a release without a line for its users is a mistake.

use anyhow::{Context, Result, ensure};

/// The section of a version, with its heading: `## VERSION` and whatever follows on that line.
pub(super) fn section(changelog: &str, version: &str) -> Result<String> {
    let is_heading = |line: &str| line.strip_prefix("## ").is_some_and(|rest| rest.split(' ').next() == Some(version));
    let mut lines = changelog.lines().skip_while(|line| !is_heading(line));
    let heading = lines.next().with_context(|| format!("CHANGELOG.md has no section `## {version}`"))?;
    let body: Vec<&str> = lines.take_while(|line| !line.starts_with("## ")).collect();
    let body = body.join("\n");
    ensure!(!body.trim().is_empty(), "the section `{heading}` of CHANGELOG.md is empty");
    Ok(format!("{heading}\n\n{}\n", body.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGELOG: &str =
        "# Changelog\n\n## 1.10.0 (unreleased)\n\n- new\n\n### Detail\n\n- more\n\n## 1.1.0\n\n- old\n## 1.0.0\n\n";

    #[test]
    fn a_section_ends_where_the_next_version_begins() {
        let newest = section(CHANGELOG, "1.10.0").expect("a section");
        assert_eq!(newest, "## 1.10.0 (unreleased)\n\n- new\n\n### Detail\n\n- more\n");
        assert_eq!(section(CHANGELOG, "1.1.0").expect("a section"), "## 1.1.0\n\n- old\n");
    }

    #[test]
    fn a_version_that_is_missing_or_empty_is_an_error() {
        assert_eq!(
            section(CHANGELOG, "1.1").expect_err("no such version").to_string(),
            "CHANGELOG.md has no section `## 1.1`"
        );
        assert!(section(CHANGELOG, "1.0.0").is_err());
    }
}
