//! Owns what is said about a policy document: findings with an id, a place and a help, for people and as JSON.
//! Called by `document` and `compile` to make findings, by `watch` and `check` to show them.
//! Must never show a finding without its place where it has one.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde::Serialize;

/// A document as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where it was read from, as the operator named it.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Severity {
    /// The document is not taken.
    Error,
    /// The document is taken, and may not mean what its author thinks.
    Warning,
}

/// One finding. The ids are stable: docs/policy.md explains each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// `NG0xx` for errors, `NG1xx` for warnings.
    pub id: &'static str,
    /// Follows from the id.
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// Where: bytes of the text. `None` only where there is no text.
    pub span: Option<Range<usize>>,
    /// What is said at the place.
    pub label: String,
    /// What to do.
    pub help: Option<String>,
}

/// A document that is not taken, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The document; its text is empty if it could not be read.
    pub source: Source,
    /// At least one error; warnings may stand among them.
    pub diagnostics: Vec<Diagnostic>,
}

/// A finding as data.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The id.
    pub id: &'static str,
    /// The severity.
    pub severity: Severity,
    /// The file.
    pub file: PathBuf,
    /// Counted from 1; 0 where there is no text.
    pub line: usize,
    /// In characters, counted from 1; 0 where there is no text.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What is said at the place.
    pub label: String,
    /// What to do.
    pub help: Option<String>,
}

impl Diagnostic {
    /// An error at a place.
    pub fn error(
        id: &'static str,
        span: Range<usize>,
        message: impl Into<String>,
        label: impl Into<String>,
    ) -> Diagnostic {
        let (message, label) = (message.into(), label.into());
        Diagnostic { id, severity: Severity::Error, message, span: Some(span), label, help: None }
    }

    /// A warning at a place.
    pub fn warning(
        id: &'static str,
        span: Range<usize>,
        message: impl Into<String>,
        label: impl Into<String>,
    ) -> Diagnostic {
        Diagnostic { severity: Severity::Warning, ..Diagnostic::error(id, span, message, label) }
    }

    /// The same with what to do.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help = Some(help.into());
        self
    }
}

impl Source {
    /// Renders findings as rustc does, with excerpts.
    pub fn render(&self, diagnostics: &[Diagnostic], colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let path = self.path.display().to_string();
        let mut out = String::new();
        for diagnostic in diagnostics {
            let level = match diagnostic.severity {
                Severity::Error => Level::ERROR,
                Severity::Warning => Level::WARNING,
            };
            let title = level.primary_title(diagnostic.message.as_str()).id(diagnostic.id);
            let mut group: Group<'_> = match &diagnostic.span {
                Some(span) if !self.text.is_empty() => {
                    let annotation = AnnotationKind::Primary.span(self.clamp(span)).label(diagnostic.label.as_str());
                    title.element(Snippet::source(self.text.as_str()).path(path.as_str()).annotation(annotation))
                }
                Some(_) | None => title.element(annotate_snippets::Origin::path(path.as_str())),
            };
            if let Some(help) = &diagnostic.help {
                group = group.element(Level::HELP.message(help.as_str()));
            }
            out.push_str(&renderer.render(&[group]));
            out.push('\n');
        }
        out
    }

    /// The same as data.
    pub fn findings(&self, diagnostics: &[Diagnostic]) -> Vec<Finding> {
        let finding = |diagnostic: &Diagnostic| {
            let (line, column) = diagnostic.span.as_ref().map_or((0, 0), |span| self.position(span.start));
            let Diagnostic { id, severity, message, label, help, .. } = diagnostic.clone();
            Finding { id, severity, file: self.path.clone(), line, column, message, label, help }
        };
        diagnostics.iter().map(finding).collect()
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    pub fn position(&self, byte: usize) -> (usize, usize) {
        let before = self.text.get(..self.clamp(&(byte..byte)).start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (before.matches('\n').count() + 1, before.get(line_start..).unwrap_or_default().chars().count() + 1)
    }

    /// A span that lies inside the text, on character boundaries, and is never empty where there is text to show.
    fn clamp(&self, span: &Range<usize>) -> Range<usize> {
        let down = |mut at: usize| {
            at = at.min(self.text.len());
            while !self.text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let start = down(span.start);
        start..down(span.end).max(start)
    }
}

impl Rejected {
    /// A document that could not even be read.
    pub fn unreadable(path: &Path, id: &'static str, message: String, help: &str) -> Rejected {
        let diagnostic = Diagnostic {
            id,
            severity: Severity::Error,
            message,
            span: None,
            label: String::new(),
            help: Some(help.to_owned()),
        };
        Rejected { source: Source { path: path.to_path_buf(), text: String::new() }, diagnostics: vec![diagnostic] }
    }

    /// All findings as text.
    pub fn render(&self, colour: bool) -> String {
        self.source.render(&self.diagnostics, colour)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_shows_file_line_column_excerpt_and_help() {
        let source = Source { path: "policy.yaml".into(), text: "a: é\nports: [102500]\n".to_owned() };
        let start = source.text.find("102500").unwrap();
        let diagnostic =
            Diagnostic::error("NG006", start..start + 6, "102500 is no port", "from 1 to 65535").help("write a port");
        let text = source.render(std::slice::from_ref(&diagnostic), false);
        assert_eq!(
            text,
            "error[NG006]: 102500 is no port\n --> policy.yaml:2:9\n  |\n2 | ports: [102500]\n  |         ^^^^^^ from 1 to 65535\n  |\n  = help: write a port\n"
        );
        let finding = &source.findings(&[diagnostic])[0];
        assert_eq!((finding.line, finding.column), (2, 9));
    }

    #[test]
    fn a_place_past_the_end_or_inside_a_character_is_shown_all_the_same() {
        let source = Source { path: "p".into(), text: "é".to_owned() };
        for span in [0..1, 1..2, 5..9, 2..2] {
            let text = source.render(&[Diagnostic::error("NG002", span, "m", "l")], false);
            assert!(text.contains("p:1:"), "{text}");
        }
    }
}
