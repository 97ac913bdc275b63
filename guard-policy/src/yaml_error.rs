//! Owns the words for a document that cannot be decoded: the problem, and what belongs at its position.
//! Called by `document`.
//! Must never show the YAML library's own words: they are about our code, not about the operator's file.

use std::ops::Range;

use serde_saphyr::Error;

/// What a diagnostic says about a decoding error.
pub(crate) struct YamlError {
    /// The problem, as the end of "not valid YAML: ...".
    pub(crate) message: String,
    /// What belongs at the position.
    pub(crate) label: String,
}

/// Describes an error at a byte range of the text.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error of the library is a defect of the syntax")]
pub(crate) fn describe(error: &Error, text: &str, span: &Range<usize>) -> YamlError {
    let (message, label) = match error {
        Error::WithSnippet { error, .. } | Error::AliasError { error, .. } => return describe(error, text, span),
        Error::Eof { .. } => ("the document is empty".to_owned(), "write a policy".to_owned()),
        Error::MultipleDocuments { .. } => say("the file has more than one document", "remove this and what follows"),
        Error::Unexpected { expected, .. } => return unexpected(expected, text.get(span.start..).unwrap_or_default()),
        Error::NullIntoString { .. } => say("a value is missing", "write a value"),
        Error::SerdeUnknownField { field, expected, .. } if expected.is_empty() => {
            (format!("unknown field `{field}`"), "write `{}`: no fields are allowed here".to_owned())
        }
        Error::SerdeUnknownField { field, expected, .. } => {
            (format!("unknown field `{field}`"), format!("the fields here are {}", expected.join(", ")))
        }
        Error::SerdeMissingField { field, .. } => {
            (format!("the field `{field}` is missing"), format!("add `{field}` beside this field"))
        }
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            let label = match first_line(text, span.start, key) {
                Some(line) => format!("the first one is on line {line}"),
                None => "remove one of the two".to_owned(),
            };
            (format!("the field `{key}` is written twice"), label)
        }
        Error::DuplicateMappingKey { key: None, .. } => say("a field is written twice", "remove one of the two"),
        Error::UnknownAnchor { .. } => say("this alias has no anchor", "an anchor `&name` must stand before `*name`"),
        Error::RecursiveReferencesRequireWeakTypes { .. } => {
            say("an alias stands inside its own anchor", "write the value instead of `*name`")
        }
        Error::MergeValueNotMapOrSeqOfMaps { .. } => say("`<<` merges only fields", "remove `<<`"),
        Error::Budget { .. } => say("the document is too large", "it has too many values, or uses too many aliases"),
        Error::ExternalMessage { msg, .. } | Error::Message { msg, .. } => return syntax(msg),
        _ => say(BROKEN, CHECK),
    };
    YamlError { message, label }
}

const BROKEN: &str = "the syntax is broken";
const CHECK: &str = "check the indentation, brackets and quotes here and above";

/// Parts of the library's messages about syntax, and our words for each.
const SYNTAX: [(&str, &str, &str); 14] = [
    ("unclosed bracket", "a bracket is not closed", "this bracket is opened here"),
    ("mismatched bracket", "a bracket is closed by one of another kind", "write `]` after `[`, and `}` after `{`"),
    ("misplaced bracket", "a bracket is closed that is not open", "remove it, or open it before"),
    ("unclosed quote", "a quote is not closed", "the quote begins here"),
    ("tabs disallowed", "a line is indented with a tab", "indent with spaces"),
    (
        "mapping values are not allowed",
        "a `:` is not allowed here",
        "align the line, or quote a value that contains `: `",
    ),
    ("did not find expected key", "the indentation does not match", "align this line with a field above"),
    ("expected '-'", "the indentation does not match", "begin the entry with `- `, aligned with the entries above"),
    ("simple key expected", "a `:` is missing", "write `field: value`"),
    ("unexpected character", "a value cannot begin with this character", "write the value in quotes"),
    ("unknown escape", "unknown escape sequence in a quoted value", "write `\\\\` for a backslash"),
    ("<document start>", "a line that begins with `%` is not allowed", "remove it"),
    ("YAML major version", "unsupported version of YAML", "remove this line"),
    ("recursion limit", "the document is nested too deeply", "remove brackets"),
];

fn syntax(library: &str) -> YamlError {
    let known = SYNTAX.iter().find(|(part, ..)| library.contains(part));
    let (message, label) = known.map_or_else(|| say(BROKEN, CHECK), |(_, message, label)| say(message, label));
    YamlError { message, label }
}

/// A value of the wrong kind: `rest` is the text from the value on.
fn unexpected(expected: &str, rest: &str) -> YamlError {
    let (wanted, label) = match expected {
        "mapping start" => ("fields", "write fields, as in `{field: value}`"),
        "sequence start" => ("a list", "write a list, as in `[value]`"),
        "string scalar" => ("a single value", "write one value"),
        _ => ("another value", CHECK),
    };
    let line = rest.lines().next().unwrap_or_default();
    let word = line.split(['#', ',', ']', '}']).next().unwrap_or_default().trim();
    let found = match word {
        _ if line.starts_with('[') || word == "-" || word.starts_with("- ") => "a list".to_owned(),
        _ if line.starts_with('{') => "fields".to_owned(),
        // A missing value is positioned at the `:` before it.
        _ if word.starts_with(':') => "no value".to_owned(),
        _ if word.ends_with(':') || word.contains(": ") => "fields".to_owned(),
        "" | "~" | "null" => "no value".to_owned(),
        word => format!("`{}`", word.chars().take(40).collect::<String>()),
    };
    YamlError { message: format!("{wanted} expected, {found} found"), label: label.to_owned() }
}

/// The line of the field of the same name that stands before `again` in the same group of fields.
fn first_line(text: &str, again: usize, key: &str) -> Option<usize> {
    let before = text.get(..again)?;
    let column =
        |at: usize| at - before.get(..at).and_then(|before| before.rfind('\n')).map_or(0, |newline| newline + 1);
    let same_group = |first: usize| {
        let between = before.get(first..).unwrap_or_default();
        let mut depth = 0i32;
        let closed = between.chars().any(|letter| {
            depth += i32::from(matches!(letter, '[' | '{')) - i32::from(matches!(letter, ']' | '}'));
            depth < 0
        });
        let mut lines = between.lines().skip(1).filter(|line| !line.trim().is_empty() && !line.trim().starts_with('#'));
        let inside = |line: &str| line.len() - line.trim_start().len() >= column(first);
        let in_line = before.get(..first).is_some_and(|before| before.trim_end().ends_with(['{', ',']));
        !closed && depth == 0 && (in_line || (column(first) == column(again) && lines.all(inside)))
    };
    let is_field = |first: usize| {
        let name_before = before.get(..first).and_then(|before| before.chars().last());
        let after = before.get(first + key.len()..).unwrap_or_default();
        name_before.is_none_or(|letter| " \n{,\"'".contains(letter))
            && after.trim_start_matches(['"', '\'']).starts_with(':')
    };
    let first = before.match_indices(key).map(|(at, _)| at).filter(|at| is_field(*at) && same_group(*at)).last()?;
    Some(before.get(..first)?.matches('\n').count() + 1)
}

fn say(message: &str, label: &str) -> (String, String) {
    (message.to_owned(), label.to_owned())
}

#[cfg(test)]
mod tests {
    use crate::{compile::compile, diagnostic::Source, node_facts::NodeFacts};

    const HEAD: &str = "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {name: t}\n";

    /// The first finding about a document: its id, its message and its label.
    fn finding(text: &str) -> (&'static str, String, String) {
        let source = Source { path: "policy.yaml".into(), text: text.to_owned() };
        let findings = compile(&source, &NodeFacts::default()).map(|(ruleset, _)| ruleset.name).unwrap_err();
        (findings[0].id, findings[0].message.clone(), findings[0].label.clone())
    }

    /// Broken values of `spec`, and broken documents.
    fn broken() -> Vec<String> {
        let rule = |text: &str| format!("{HEAD}spec: {{mode: Enforce, guard: [{text}], tunnel: {{dial: []}}}}\n");
        let spec = |text: &str| format!("{HEAD}spec: {text}\n");
        let lines = |text: &str| format!("{HEAD}spec:\n{text}\n");
        let mut all: Vec<String> = [
            "",
            "# nothing\n",
            "hello",
            "[a, b]",
            "42",
            "null",
            "---\n---\n",
            "{",
            "[",
            "\"",
            "'",
            "? ",
            "&",
            "*",
            "!",
            "a: !<",
            "|x",
            ">9999",
            "---a",
            "...\nx",
            "- a\nb: c",
            "a:\n- b\n c: d",
            "a: b: c",
            "\t",
            "%FOO\na: b",
            "%YAML 3.0\n---\na: b",
        ]
        .map(str::to_owned)
        .into();
        all.extend(
            [
                "text",
                "[text]",
                "{}",
                "",
                "{mode: }",
                "{mode: ~}",
                "{mode: [a]}",
                "{mode: {a: b}}",
                "{mode: a, mode: b}",
            ]
            .map(spec),
        );
        all.extend(
            [
                "{guards: []}",
                "{mode: \"a}",
                "{mode: 'a}",
                "{mode: *x}",
                "{<<: text}",
                "{? [a] : b}",
                "{1: b}",
                "{~: b}",
            ]
            .map(spec),
        );
        all.extend(
            [
                "{guard: text}",
                "{guard: {}}",
                "{guard: }",
                "{tunnel: [a]}",
                "{tunnel: {dial: [}}",
                "{tunnel: {dial: []}",
                "&a [*a]",
            ]
            .map(spec),
        );
        all.extend(
            ["text", "[]", "~", "{name: a, node: 1}", "{name: a, node: {ports: 1}}", "{name: a, node: {ports: [[1]]}}"]
                .map(rule),
        );
        all.extend(
            ["{name: a, allow: tunnel}", "{name: a, allow: [tunnel]}", "{name: a, allow: [tunnel: yes]}"].map(rule),
        );
        all.extend(
            [
                "{name: a, allow: [tunnel: {a: b}]}",
                "{name: a, allow: [ipBlock: 10.0.0.0/8]}",
                "{name: a, node: {ports: [~]}}",
            ]
            .map(rule),
        );
        all.extend(
            [
                "\tmode: a",
                "  mode: a\n   guard: []",
                "  mode: a\n guard: []",
                "  mode: a: b",
                "  mode: @x",
                "  mode: \"\\q\"",
            ]
            .map(lines),
        );
        all.extend(["  mode: |\n  x", "  guard:\n  - a\n - b", "  mode: `x`", "  mode: %x"].map(lines));
        all.extend([
            spec(&"[".repeat(3000)),
            spec(&format!("&a x\nb: [{}]", "*a, ".repeat(70))),
            format!("{HEAD}]"),
            format!("{HEAD}spec: \0"),
        ]);
        all
    }

    #[test]
    fn no_finding_speaks_of_the_library_or_of_our_code() {
        const FORBIDDEN: [&str; 34] = [
            "Option",
            "Policy in",
            "serde",
            "deserialize",
            "from_str",
            "mapping",
            "sequence start",
            "scalar",
            "null ",
            "struct",
            "enum",
            "variant",
            "invalid type",
            "did not find",
            "while parsing",
            "while scanning",
            "disallowed",
            "simple key",
            "breach",
            "budget",
            "recursion",
            "weak",
            "unknown anchor",
            "merge value",
            "document start",
            "major version",
            "mismatched",
            "misplaced",
            "unclosed",
            "indicator",
            "tag URI",
            "end of input",
            "expected one of",
            "multiple YAML",
        ];
        for text in broken() {
            let (id, message, label) = finding(&text);
            assert!(matches!(id, "NG002" | "NG003"), "{id} {text}");
            for words in [&message, &label] {
                assert!(!words.is_empty() && !words.ends_with(' '), "{message:?} {label:?} {text}");
                let found: Vec<&&str> = FORBIDDEN.iter().filter(|forbidden| words.contains(**forbidden)).collect();
                assert!(found.is_empty(), "{found:?} in {words:?} about\n{text}");
            }
        }
    }

    #[test]
    fn a_finding_says_what_the_file_has_and_what_belongs_there() {
        let spec = |text: &str| format!("{HEAD}spec: {text}\n");
        for (text, message, label) in [
            (String::new(), "the document is empty", "write a policy"),
            (
                spec("{guards: []}"),
                "unknown field `guards`",
                "the fields here are mode, guard, tunnel, controlPlane, edge",
            ),
            (spec("{mode: a, guard: []}"), "the field `tunnel` is missing", "add `tunnel` beside this field"),
            (spec("{mode: a, guard: text}"), "a list expected, `text` found", "write a list, as in `[value]`"),
            (spec("{mode: [a]}"), "a single value expected, a list found", "write one value"),
            (spec("[a]"), "fields expected, a list found", "write fields, as in `{field: value}`"),
            (spec("{mode: }"), "a value is missing", "write a value"),
            (spec("{mode: a, tunnel: }"), "fields expected, no value found", "write fields, as in `{field: value}`"),
            (
                spec("{mode: a, tunnel: {dial: [}}"),
                "a bracket is closed by one of another kind",
                "write `]` after `[`, and `}` after `{`",
            ),
            (format!("{HEAD}spec:\n\tmode: a"), "a line is indented with a tab", "indent with spaces"),
        ] {
            let (_, found, beside) = finding(&text);
            assert!(found.ends_with(&format!(": {message}")), "{found:?} {message:?}");
            assert_eq!(beside, label, "{text}");
        }
    }

    #[test]
    fn a_field_that_is_written_twice_names_both_lines() {
        let twice = |text: String| {
            let (_, message, label) = finding(&text);
            assert!(message.contains("is written twice"), "{message} {text}");
            label
        };
        assert_eq!(twice(format!("{HEAD}kind: NodeGuardPolicy\n")), "the first one is on line 2");
        let spec = |text: &str| format!("{HEAD}spec:\n{text}\n");
        assert_eq!(twice(spec("  mode: a\n  guard: [{mode: b}]\n  mode: c")), "the first one is on line 5");
        assert_eq!(
            twice(spec("  guard:\n  - mode: a\n  - name: b\n    mode: c\n    # mode: d\n    mode: e")),
            "the first one is on line 8"
        );
        assert_eq!(
            twice(spec("  guard: [{name: a,\n    mode: b, allow: [{mode: d}], mode: e}]")),
            "the first one is on line 6"
        );
        assert_eq!(twice(spec("  \"mode\": a\n  mode: b")), "remove one of the two");
    }
}
