//! Planted imports, each in a few lines of a crate that exists nowhere else.

use std::collections::BTreeMap;

use super::{cycles::cycles, imports_of, resolve::Edges, rooms::upward};

/// The imports of a crate made of these files; its root is the first.
fn edges(files: &[(&str, &str)]) -> Edges {
    let sources: BTreeMap<&str, &str> = files.iter().copied().collect();
    imports_of(files[0].0, &|file| sources.get(file).map(|text| (*text).to_owned())).expect("sources that parse")
}

/// The same as lines `from -> to: item`.
fn lines(files: &[(&str, &str)]) -> Vec<String> {
    let edges = edges(files);
    let line = |((from, to), items): (&(String, String), &BTreeMap<String, usize>)| {
        items.keys().map(|item| format!("{from} -> {to}: {item}")).collect::<Vec<_>>()
    };
    edges.iter().flat_map(line).collect()
}

#[test]
fn a_planted_upward_import_is_refused_with_its_place() {
    let found = upward(&edges(&[
        ("guard/src/lib.rs", "mod net;\nmod sys;"),
        ("guard/src/net.rs", "pub struct Host;"),
        ("guard/src/sys/mod.rs", "mod lock;"),
        ("guard/src/sys/lock.rs", "\nuse crate::net::Host;\n"),
    ]));
    assert_eq!(
        found,
        ["guard/src/sys/lock.rs:2: upward import of `Host` from guard/src/net.rs: `sys` must not know `net`"]
    );
}

#[test]
fn an_import_to_the_right_and_one_of_no_room_are_let_through() {
    let files = [
        ("guard/src/lib.rs", "mod net;\nmod sys;\nmod old;"),
        ("guard/src/net.rs", "use crate::{old::Old, sys::Lock};"),
        ("guard/src/sys.rs", "use crate::old::Old;\npub struct Lock;"),
        ("guard/src/old.rs", "use crate::sys::Lock;\npub struct Old;"),
    ];
    assert_eq!(upward(&edges(&files)), [""; 0]);
}

#[test]
fn what_the_root_of_the_crate_defines_stands_above_every_room() {
    let found = upward(&edges(&[
        ("guard/src/lib.rs", "mod sys;\npub const NAME: &str = \"\";"),
        ("guard/src/sys.rs", "fn name() -> &'static str { crate::NAME }"),
    ]));
    assert_eq!(found.len(), 1, "{found:?}");
}

#[test]
fn a_planted_cycle_is_printed_with_the_items_that_close_it() {
    let found = cycles(&edges(&[
        ("lib.rs", "mod a;\nmod b;\nmod c;\nmod d;"),
        ("a.rs", "use crate::b::{self, B};\npub struct A;\nfn f() { b::make() }"),
        ("b.rs", "pub struct B;\npub fn make() {}\n\nfn g(_: crate::c::C) {}"),
        ("c.rs", "pub use super::a::A as C;\npub struct C2;\nuse crate::a::A;"),
        ("d.rs", "use crate::{a::A, b::B};"),
    ]));
    assert_eq!(
        found,
        ["2 files import each other:\n  a.rs:1: `B` from b.rs\n  a.rs:3: `make` from b.rs\n  b.rs:4: `C` from a.rs"]
    );
}

#[test]
fn a_parent_that_only_declares_or_reexports_its_child_is_no_cycle_until_the_child_looks_up() {
    let declared = [("lib.rs", "mod a;"), ("a/mod.rs", "mod b;\npub struct A;"), ("a/b.rs", "use super::A;")];
    assert_eq!(cycles(&edges(&declared)), [""; 0]);
    let sibling = [
        ("lib.rs", "mod a;"),
        ("a/mod.rs", "mod b;\nmod c;\npub use b::B;\npub use c::C;"),
        ("a/b.rs", "use super::C;\npub struct B(C);"),
        ("a/c.rs", "pub struct C;"),
    ];
    assert_eq!(cycles(&edges(&sibling)), [""; 0]);
    let looks_up = [
        ("lib.rs", "mod a;"),
        ("a/mod.rs", "mod b;\npub use b::B;\npub struct A;"),
        ("a/b.rs", "use super::A;\npub struct B(A);"),
    ];
    assert_eq!(cycles(&edges(&looks_up)).len(), 1);
}

#[test]
fn a_reexport_counts_for_the_file_that_defines_the_item() {
    let found = lines(&[
        ("lib.rs", "mod a;\nmod b;"),
        ("a/mod.rs", "mod inner;\npub use inner::*;"),
        ("a/inner.rs", "pub struct Deep;"),
        ("b.rs", "use crate::a::Deep;"),
    ]);
    assert_eq!(found, ["a/mod.rs -> a/inner.rs: *", "b.rs -> a/inner.rs: Deep"]);
}

#[test]
fn paths_are_found_in_types_expressions_macros_attributes_and_blocks() {
    let found = lines(&[
        ("lib.rs", "mod a;\nmod b;\nmod c;\nmod d;\nmod e;\nmod f;"),
        (
            "a.rs",
            "#[serde(with = \"crate::e::seconds\")]\nstruct S(Vec<crate::b::B>);\nfn f() {\n    use super::d::D;\n    \
             print!(\"{}\", [crate::c::name()]);\n    if super::f::ON {}\n}",
        ),
        ("b.rs", "pub struct B;"),
        ("c.rs", "pub fn name() {}"),
        ("d.rs", "pub struct D;"),
        ("e.rs", "pub mod seconds {}"),
        ("f.rs", "pub const ON: bool = true;"),
    ]);
    let want = ["a.rs -> b.rs: B", "a.rs -> c.rs: name", "a.rs -> d.rs: D", "a.rs -> e.rs: *", "a.rs -> f.rs: ON"];
    assert_eq!(found, want);
}

#[test]
fn tests_visibilities_and_other_crates_import_nothing() {
    let found = lines(&[
        ("lib.rs", "mod a;\nmod b;"),
        (
            "a.rs",
            "use tokio::b::B;\nuse ::b::C;\npub(in crate::b) struct A;\n#[cfg(test)]\nmod a_tests;\n\
             #[cfg(test)]\nmod tests { use crate::b::B; }\n#[cfg(all(test, unix))]\nuse crate::b::B;\n\
             fn f() { ::b::g(); print!(\"{}\", ::b::B); }",
        ),
        ("b.rs", "pub struct B;"),
    ]);
    assert_eq!(found, [""; 0]);
}

#[test]
fn what_is_compiled_without_tests_is_read_too() {
    let files =
        [("lib.rs", "mod a;\nmod b;"), ("a.rs", "#[cfg(not(test))]\nuse crate::b::B;"), ("b.rs", "pub struct B;")];
    assert_eq!(lines(&files), ["a.rs -> b.rs: B"]);
}

#[test]
fn a_module_at_a_path_of_its_own_is_found() {
    let files = [
        ("guard/build.rs", "#[path = \"../xtask/stamp.rs\"]\nmod stamp;\nfn main() { stamp::of() }"),
        ("xtask/stamp.rs", "pub fn of() {}"),
    ];
    assert_eq!(lines(&files), ["guard/build.rs -> xtask/stamp.rs: of"]);
}
