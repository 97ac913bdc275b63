//! Owns the checks of the shape of the source files: their length, their header, unfinished places, errors that are strings, shared names.
//! Called by `lint`.
//! Must never read a file itself except to collect the sources: each check is a function of names and texts.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::Result;
use syn::{
    GenericArgument, Item, PathArguments, Type,
    spanned::Spanned,
    visit::{self, Visit},
};

use super::{imports::is_test, settle};
use crate::shell::{command, read};

/// The lines of a file without its tests from which on it should be split by case.
const LONG: usize = 400;

/// The sources of the product.
const PRODUCT: [&str; 4] = ["guard/src/", "guard-policy/src/", "guard-common/src/", "guard-ebpf/src/"];

/// Names that files or types of the product share, and why.
const SHARED: [(&str, &str); 4] = [
    ("mod.rs", "the language: a module with a folder"),
    ("lib.rs", "the language: the root of a library"),
    ("main.rs", "the language: the root of a program"),
    ("tests.rs", "the tests of the module that its folder is named after"),
];

/// A source file: its name below the workspace root, and its text.
pub(super) type Source = (String, String);

/// Runs every check on every source file of a workspace that git knows or could add.
pub(super) fn tidy(root: &Path) -> Result<()> {
    let names = read(command("git").current_dir(root).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.rs",
    ]))?;
    let text = |name: &str| Some((name.to_owned(), fs::read_to_string(root.join(name)).ok()?));
    let sources: Vec<Source> = names.lines().filter_map(text).collect();
    let product: Vec<&Source> =
        sources.iter().filter(|(name, _)| PRODUCT.iter().any(|folder| name.starts_with(folder))).collect();
    let mut findings: Vec<String> = sources.iter().flat_map(shape).collect();
    findings.extend(product.iter().flat_map(|source| string_errors(source)));
    findings.extend(shared_names(&product));
    settle(&findings)
}

/// A file that is too long, a module that does not say what it owns, an unfinished place.
fn shape((name, text): &Source) -> Vec<String> {
    let mut found = Vec::new();
    let code = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
    if code > LONG {
        found.push(format!("{name}: {code} lines before its tests, more than {LONG}: split it by case"));
    }
    if !text.starts_with("//!") {
        found.push(format!("{name}: the header that says what the module owns is missing"));
    }
    // In two parts, so that this file does not find itself.
    let unfinished = [["TO", "DO"].concat(), ["FIX", "ME"].concat()];
    for (number, line) in text.lines().enumerate() {
        if unfinished.iter().any(|word| line.contains(word)) {
            found.push(format!("{name}:{}: unfinished", number + 1));
        }
    }
    found
}

/// A `Result` whose error is a string: an error is a type with the facts in its fields.
fn string_errors((name, text): &Source) -> Vec<String> {
    struct Found(Vec<usize>);
    impl<'ast> Visit<'ast> for Found {
        fn visit_item(&mut self, item: &'ast Item) {
            if !is_test(item) {
                visit::visit_item(self, item);
            }
        }
        fn visit_type_path(&mut self, path: &'ast syn::TypePath) {
            if let Some(last) = path.path.segments.last()
                && last.ident == "Result"
                && let PathArguments::AngleBracketed(arguments) = &last.arguments
                && let Some(GenericArgument::Type(error)) = arguments.args.iter().nth(1)
                && is_text(error)
            {
                self.0.push(path.span().start().line);
            }
            visit::visit_type_path(self, path);
        }
    }
    if is_test_file(name) {
        return Vec::new();
    }
    let mut found = Found(Vec::new());
    match syn::parse_file(text) {
        Ok(file) => found.visit_file(&file),
        Err(error) => return vec![format!("{name}: {error}")],
    }
    found.0.iter().map(|line| format!("{name}:{line}: the error of this `Result` is a string, not a type")).collect()
}

/// `String` or a reference to `str`.
#[expect(clippy::wildcard_enum_match_arm, reason = "syntax has more kinds than matter here")]
fn is_text(error: &Type) -> bool {
    match error {
        Type::Path(path) => path.path.segments.last().is_some_and(|last| last.ident == "String" || last.ident == "str"),
        Type::Reference(reference) => is_text(&reference.elem),
        _ => false,
    }
}

/// Two files of one name, or two types of one name, in the product.
fn shared_names(product: &[&Source]) -> Vec<String> {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, text) in product.iter().filter(|(name, _)| !is_test_file(name)) {
        places.entry(name.rsplit('/').next().unwrap_or(name).to_owned()).or_default().push(name.clone());
        // A file that does not parse is a finding of its own.
        for (ident, line) in syn::parse_file(text).map(|file| types(&file.items)).unwrap_or_default() {
            places.entry(ident).or_default().push(format!("{name}:{line}"));
        }
    }
    let shared =
        places.iter().filter(|(name, places)| places.len() > 1 && !SHARED.iter().any(|(allowed, _)| allowed == name));
    shared.map(|(name, places)| format!("`{name}` names several things: {}", places.join(", "))).collect()
}

/// The types and traits that these items define, with their lines.
#[expect(clippy::wildcard_enum_match_arm, reason = "syntax has more kinds than matter here")]
fn types(items: &[Item]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for item in items.iter().filter(|item| !is_test(item)) {
        let ident = match item {
            Item::Enum(item) => &item.ident,
            Item::Struct(item) => &item.ident,
            Item::Trait(item) => &item.ident,
            Item::Type(item) => &item.ident,
            Item::Union(item) => &item.ident,
            Item::Mod(module) => {
                found.extend(module.content.iter().flat_map(|(_, items)| types(items)));
                continue;
            }
            _ => continue,
        };
        found.push((ident.to_string(), ident.span().start().line));
    }
    found
}

/// Whether a file holds nothing but tests.
fn is_test_file(name: &str) -> bool {
    name.ends_with("/tests.rs") || name.ends_with("_tests.rs")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, text: &str) -> Source {
        (name.to_owned(), text.to_owned())
    }

    #[test]
    fn a_planted_long_file_is_found_and_its_tests_do_not_count() {
        let long = format!("//! Owns.\n{}", "const A: u8 = 0;\n".repeat(LONG));
        assert_eq!(
            shape(&source("a.rs", &long)),
            ["a.rs: 401 lines before its tests, more than 400: split it by case"]
        );
        let tests = format!("//! Owns.\n#[cfg(test)]\n{}", "const A: u8 = 0;\n".repeat(LONG));
        assert_eq!(shape(&source("a.rs", &tests)), [""; 0]);
    }

    #[test]
    fn a_planted_missing_header_and_an_unfinished_place_are_found() {
        let text = format!("use std::fs;\n// {}: later\n", ["TO", "DO"].concat());
        let want = ["a.rs: the header that says what the module owns is missing", "a.rs:2: unfinished"];
        assert_eq!(shape(&source("a.rs", &text)), want);
    }

    #[test]
    fn a_planted_string_error_is_found_wherever_a_type_stands() {
        let text = "fn a() -> Result<u8, String> { Ok(0) }\n\
                    struct S { f: fn() -> Result<(), &'static str> }\n\
                    type T = std::result::Result<Vec<Result<u8, std::string::String>>, u8>;\n\
                    fn b() -> Result<String, Error> { c::<Result<(), Error>>() }\n\
                    #[cfg(test)]\nmod tests { fn a() -> Result<u8, String> { Ok(0) } }\n";
        let lines: Vec<String> =
            [1, 2, 3].map(|line| format!("a.rs:{line}: the error of this `Result` is a string, not a type")).into();
        assert_eq!(string_errors(&source("a.rs", text)), lines);
        assert_eq!(string_errors(&source("a_tests.rs", text)), [""; 0]);
    }

    #[test]
    fn a_planted_second_file_and_type_of_one_name_are_found() {
        let sources = [
            source("guard/src/a/edge.rs", "struct Table;\n#[cfg(test)]\nmod tests { struct Packet; }"),
            source("guard/src/b/edge.rs", "mod inner {\n    enum Table {}\n}\nstruct Packet;"),
            source("guard/src/a/mod.rs", ""),
            source("guard/src/b/mod.rs", ""),
            source("guard/src/b/edge_tests.rs", "struct Packet;"),
        ];
        let want = [
            "`Table` names several things: guard/src/a/edge.rs:1, guard/src/b/edge.rs:2",
            "`edge.rs` names several things: guard/src/a/edge.rs, guard/src/b/edge.rs",
        ];
        assert_eq!(shared_names(&sources.iter().collect::<Vec<_>>()), want);
    }
}
