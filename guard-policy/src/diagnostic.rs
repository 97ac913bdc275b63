//! Owns findings about a policy document: each has an id, a position and a help text, and is rendered for people and as JSON.
//! Called by `document`, `parse` and `compile` to make findings; by `daemon/edit` and `nodeguard check` to show them.
//! Must never show a finding without its position if it has one.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde::Serialize;

use crate::visible::{in_place, visible};

/// The text of a document and the path that it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The path as the operator wrote it.
    pub path: PathBuf,
    /// The text of the document.
    pub text: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Severity {
    /// The document is rejected.
    Error,
    /// The document is accepted, but it may not do what its author expects.
    Warning,
}

/// One finding. The ids are stable: docs/policy.md explains each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// `NG0xx` for errors, `NG1xx` for warnings.
    pub id: &'static str,
    /// `Error` for `NG0xx`, `Warning` for `NG1xx`.
    pub severity: Severity,
    /// The problem, in one line.
    pub message: String,
    /// The position, as a byte range of the text. `None` if the text could not be read.
    pub span: Option<Range<usize>>,
    /// The text shown at the position.
    pub label: String,
    /// How to solve the problem.
    pub help: Option<String>,
}

/// A rejected document and the reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The document. Its text is empty if the file could not be read.
    pub source: Source,
    /// At least one error, possibly with warnings among them.
    pub diagnostics: Vec<Diagnostic>,
}

/// A finding as it appears in JSON.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The id, as in `NG006`.
    pub id: &'static str,
    /// `error` or `warning`.
    pub severity: Severity,
    /// The path of the file.
    pub file: PathBuf,
    /// The line, counted from 1; 0 if there is no text.
    pub line: usize,
    /// The column in characters, counted from 1; 0 if there is no text.
    pub column: usize,
    /// The problem, in one line.
    pub message: String,
    /// The text shown at the position.
    pub label: String,
    /// How to solve the problem.
    pub help: Option<String>,
}

impl Diagnostic {
    /// An error at a byte range of the text.
    pub fn error(
        id: &'static str,
        span: Range<usize>,
        message: impl Into<String>,
        label: impl Into<String>,
    ) -> Diagnostic {
        let (message, label) = (message.into(), label.into());
        Diagnostic { id, severity: Severity::Error, message, span: Some(span), label, help: None }
    }

    /// A warning at a byte range of the text.
    pub fn warning(
        id: &'static str,
        span: Range<usize>,
        message: impl Into<String>,
        label: impl Into<String>,
    ) -> Diagnostic {
        Diagnostic { severity: Severity::Warning, ..Diagnostic::error(id, span, message, label) }
    }

    /// Adds a help text.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help = Some(help.into());
        self
    }
}

impl Source {
    /// Renders findings as rustc does: with the file, the line, the column and an excerpt. `colour` adds terminal escapes.
    pub fn render(&self, diagnostics: &[Diagnostic], colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let path = self.path.display().to_string();
        let (path, text) = (visible(&path), in_place(&self.text));
        let mut out = String::new();
        for diagnostic in diagnostics {
            let level = match diagnostic.severity {
                Severity::Error => Level::ERROR,
                Severity::Warning => Level::WARNING,
            };
            let (message, label) = (visible(&diagnostic.message), visible(&diagnostic.label));
            let title = level.primary_title(message).id(diagnostic.id);
            let mut group: Group<'_> = match &diagnostic.span {
                Some(span) if !self.text.is_empty() => {
                    let annotation = AnnotationKind::Primary.span(self.clamp(span)).label(label);
                    title.element(Snippet::source(text.as_str()).path(&*path).annotation(annotation))
                }
                Some(_) | None => title.element(annotate_snippets::Origin::path(&*path)),
            };
            if let Some(help) = &diagnostic.help {
                group = group.element(Level::HELP.message(visible(help)));
            }
            out.push_str(&renderer.render(&[group]));
            out.push('\n');
        }
        out
    }

    /// Converts findings for JSON.
    pub fn findings(&self, diagnostics: &[Diagnostic]) -> Vec<Finding> {
        let finding = |diagnostic: &Diagnostic| {
            let (line, column) = diagnostic.span.as_ref().map_or((0, 0), |span| self.position(span.start));
            let Diagnostic { id, severity, message, label, help, .. } = diagnostic.clone();
            Finding { id, severity, file: self.path.clone(), line, column, message, label, help }
        };
        diagnostics.iter().map(finding).collect()
    }

    /// The line and the column of a byte offset, both counted from 1. The column counts characters.
    pub fn position(&self, byte: usize) -> (usize, usize) {
        let before = self.text.get(..self.clamp(&(byte..byte)).start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (before.matches('\n').count() + 1, before.get(line_start..).unwrap_or_default().chars().count() + 1)
    }

    /// The part of a span that lies inside the text, moved back to character boundaries.
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
    /// A document whose file could not be read.
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

    /// Renders all findings as text.
    pub fn render(&self, colour: bool) -> String {
        self.source.render(&self.diagnostics, colour)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::visible::acts;

    #[test]
    fn a_finding_shows_file_line_column_excerpt_and_help() {
        let source = Source { path: "policy.yaml".into(), text: "a: é\nports: [102500]\n".to_owned() };
        let start = source.text.find("102500").unwrap();
        let diagnostic = Diagnostic::error("NG006", start..start + 6, "102500 is not a port", "from 1 to 65535")
            .help("write a port");
        let text = source.render(std::slice::from_ref(&diagnostic), false);
        assert_eq!(
            text,
            "error[NG006]: 102500 is not a port\n --> policy.yaml:2:9\n  |\n2 | ports: [102500]\n  |         ^^^^^^ from 1 to 65535\n  |\n  = help: write a port\n"
        );
        let finding = &source.findings(&[diagnostic])[0];
        assert_eq!((finding.line, finding.column), (2, 9));
    }

    #[test]
    fn nothing_in_a_document_or_its_name_steers_the_terminal() {
        let acting = "\u{1b}[2J\u{9b}H\u{7}\u{202e}\u{200b}";
        let text = format!("a: {acting}\nports: [{acting}]\n");
        let source = Source { path: format!("p{acting}\n.yaml").into(), text };
        let span = source.text.find('[').unwrap()..source.text.len() - 1;
        let found = Diagnostic::error("NG006", span, acting, acting).help(acting);
        for (found, colour) in
            [(found.clone(), false), (Diagnostic { span: None, ..found.clone() }, false), (found, true)]
        {
            let text = source.render(&[found], colour);
            // The colours are our own.
            let text = if colour { text.replace("\u{1b}[0m", "").replace("\u{1b}[1m", "") } else { text };
            let acts = |character: char| acts(character) && character != '\n' && !(colour && character == '\u{1b}');
            assert!(!text.chars().any(acts), "{text:?}");
            assert!(!text.contains("\u{1b}[2J"), "{text:?}");
        }
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
