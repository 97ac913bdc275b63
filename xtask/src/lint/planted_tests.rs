//! Violations planted in a small workspace that needs no network: each check that runs a program finds its own.

use std::fs;

use super::{Check, clippy, doc, unused_dependencies};

/// A workspace in which every check passes.
const CLEAN: [(&str, &str); 8] = [
    ("Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"guard-common\", \"guard-policy\", \"fuzz\"]\n"),
    (
        "Cargo.lock",
        "version = 4\n\n[[package]]\nname = \"fuzz\"\nversion = \"0.1.0\"\ndependencies = [\n \"guard-policy\",\n]\n\n\
         [[package]]\nname = \"guard-common\"\nversion = \"0.1.0\"\n\n\
         [[package]]\nname = \"guard-policy\"\nversion = \"0.1.0\"\ndependencies = [\n \"guard-common\",\n]\n",
    ),
    ("guard-common/Cargo.toml", "[package]\nname = \"guard-common\"\nversion = \"0.1.0\"\nedition = \"2024\"\n"),
    (
        "guard-common/src/lib.rs",
        "//! Owns a type.\n\n/// A type, made by [`make`].\npub struct Common;\n\n/// Makes a [`Common`].\npub fn make() -> Common {\n    Common\n}\n",
    ),
    (
        "guard-policy/Cargo.toml",
        "[package]\nname = \"guard-policy\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
         [dependencies]\nguard-common = { path = \"../guard-common\" }\n",
    ),
    (
        "guard-policy/src/lib.rs",
        "//! Owns another type.\n\n/// A policy.\npub struct Policy(pub guard_common::Common);\n",
    ),
    (
        "fuzz/Cargo.toml",
        "[package]\nname = \"fuzz\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
         [dependencies]\nguard-policy = { path = \"../guard-policy\" }\n\n[[bin]]\nname = \"policy\"\npath = \"policy.rs\"\n",
    ),
    ("fuzz/policy.rs", "//! A target.\n\nfn main() {\n    let _: Option<guard_policy::Policy> = None;\n}\n"),
];

/// A check passes in the clean workspace, and finds what another text of one of its files plants.
fn finds((name, check): Check, planted: (&str, &str), want: &str) {
    let root = tempfile::tempdir().expect("a folder");
    let write = |(path, text): (&str, &str)| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, text).expect("a file");
    };
    CLEAN.into_iter().for_each(write);
    check(root.path()).unwrap_or_else(|error| panic!("{name} fails in the clean workspace:\n{error:#}"));
    write(planted);
    let error = check(root.path()).err().unwrap_or_else(|| panic!("{name} does not see {}", planted.0)).to_string();
    assert!(error.contains(want), "{name} says something else:\n{error}");
}

#[test]
fn a_planted_fuzz_target_that_does_not_compile_is_found() {
    let planted = ("fuzz/policy.rs", "//! A target.\n\nfn main() {\n    guard_policy::parse();\n}\n");
    finds(("clippy", clippy), planted, "cannot find function `parse`");
}

#[test]
fn a_planted_link_to_nothing_is_found() {
    let planted = ("guard-common/src/lib.rs", "//! Owns a type.\n\n/// See [`Nothing`].\npub struct Common;\n");
    finds(("doc", doc), planted, "unresolved link to `Nothing`");
}

#[test]
fn a_planted_dependency_that_nothing_uses_is_found() {
    let planted = ("guard-policy/src/lib.rs", "//! Owns another type.\n\n/// A policy.\npub struct Policy;\n");
    finds(("unused dependencies", unused_dependencies), planted, "guard-common");
}
