//! Owns what one module defines, imports and mentions: its items, its `use` trees, and the paths in code, types, macros and attributes.
//! Called by `tree` for each item of a module.
//! Must never decide what a path refers to: `resolve` does.

#![expect(clippy::wildcard_enum_match_arm, reason = "syntax has more kinds than matter here")]

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::{
    Attribute, Expr, ImplItem, Item, Lit, Meta, UseTree,
    spanned::Spanned,
    visit::{self, Visit},
};

/// One module, in a file of its own or inline.
#[derive(Default)]
pub(crate) struct Module {
    /// The module that declares it; the root has none.
    pub(crate) parent: Option<usize>,
    /// Its file, an index into the files of the tree.
    pub(crate) file: usize,
    /// The modules that it declares, by name.
    pub(crate) children: BTreeMap<String, usize>,
    /// The names of the items that it defines.
    pub(crate) defined: BTreeSet<String>,
    /// What its `use` items bring into scope.
    pub(crate) imports: Vec<Import>,
    /// The paths in its code, macros and attributes.
    pub(crate) mentions: Vec<Mention>,
}

/// One leaf of a `use` tree.
pub(crate) struct Import {
    /// The name in scope; `None` is a glob.
    pub(crate) name: Option<String>,
    /// The path and the line of the leaf.
    pub(crate) from: Mention,
}

/// A path, and the line where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mention {
    pub(crate) path: Vec<String>,
    pub(crate) line: usize,
}

/// Adds what an item defines, imports and mentions to its module.
pub(crate) fn collect(item: &Item, module: &mut Module) {
    module.defined.extend(defines(item));
    Collector(module).visit_item(item);
}

/// Whether an item is compiled for tests only.
pub(in crate::lint) fn is_test(item: &Item) -> bool {
    attributes(item).iter().any(is_test_only)
}

/// The value of a `#[path = "..."]`.
pub(crate) fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Some(text.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    })
}

fn defines(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(ident.to_string())
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// `#[test]`, `#[cfg(test)]`, or a `cfg` of which `test` is a part that is not negated.
fn is_test_only(attribute: &Attribute) -> bool {
    if attribute.path().is_ident("test") {
        return true;
    }
    let Meta::List(list) = &attribute.meta else { return false };
    list.path.is_ident("cfg") && has_test(list.tokens.clone())
}

fn has_test(tokens: TokenStream) -> bool {
    let mut negated = false;
    for token in tokens {
        match token {
            TokenTree::Ident(ident) => {
                if ident == "test" {
                    return true;
                }
                negated = ident == "not" || ident == "any";
            }
            TokenTree::Group(group) if !negated && has_test(group.stream()) => return true,
            _ => {}
        }
    }
    false
}

struct Collector<'a>(&'a mut Module);

impl Collector<'_> {
    fn import(&mut self, tree: &UseTree, prefix: &[String]) {
        let with = |ident: &syn::Ident| -> Vec<String> {
            let last = Some(ident.to_string()).filter(|name| name != "self");
            prefix.iter().cloned().chain(last).collect()
        };
        let line = tree.span().start().line;
        let mut add = |name: Option<String>, path| {
            self.0.imports.push(Import { name, from: Mention { path, line } });
        };
        match tree {
            UseTree::Path(path) => {
                let prefix: Vec<String> = prefix.iter().cloned().chain([path.ident.to_string()]).collect();
                self.import(&path.tree, &prefix);
            }
            UseTree::Name(leaf) => {
                let path = with(&leaf.ident);
                add(path.last().cloned(), path);
            }
            UseTree::Rename(leaf) => add(Some(leaf.rename.to_string()), with(&leaf.ident)),
            UseTree::Glob(_) => add(None, prefix.to_vec()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(tree, prefix)),
        }
    }

    fn mention(&mut self, path: Vec<String>, line: usize) {
        if path.len() > 1 {
            self.0.mentions.push(Mention { path, line });
        }
    }

    /// The paths among the tokens of a macro or an attribute, which `syn` does not parse; in an attribute a string can be a path, too.
    fn tokens(&mut self, tokens: TokenStream, attribute: bool) {
        let mut path: Vec<String> = Vec::new();
        let (mut line, mut colons, mut absolute) = (0, 0, false);
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.mention(std::mem::take(&mut path), line);
                        absolute = false;
                    } else if path.is_empty() {
                        absolute = true;
                    }
                    if !absolute {
                        line = if path.is_empty() { ident.span().start().line } else { line };
                        path.push(ident.to_string());
                    }
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                other => {
                    self.mention(std::mem::take(&mut path), line);
                    (colons, absolute) = (0, false);
                    match other {
                        TokenTree::Group(group) if group.delimiter() != Delimiter::None => {
                            self.tokens(group.stream(), attribute);
                        }
                        TokenTree::Literal(literal) if attribute => {
                            // A module that is named in this way is one whose functions are called.
                            let mut words = words_of(&literal.to_string());
                            words.extend((words.len() > 1).then(|| "*".to_owned()));
                            self.mention(words, literal.span().start().line);
                        }
                        _ => {}
                    }
                }
            }
        }
        self.mention(path, line);
    }
}

/// The segments of a string literal that is a path, as in `#[serde(with = "crate::duration")]`.
fn words_of(literal: &str) -> Vec<String> {
    let text = literal.trim_matches('"');
    let is_word = |word: &str| {
        word.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && word.chars().all(|each| each.is_ascii_alphanumeric() || each == '_')
    };
    let words: Vec<String> = text.split("::").map(str::to_owned).collect();
    if words.iter().all(|word| is_word(word)) { words } else { Vec::new() }
}

impl<'ast> Visit<'ast> for Collector<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test(item) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        if !matches!(item, ImplItem::Fn(function) if function.attrs.iter().any(is_test_only)) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if item.leading_colon.is_none() {
            self.import(&item.tree, &[]);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let words = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.mention(words, path.span().start().line);
        }
        visit::visit_path(self, path);
    }

    /// The path of `pub(in path)` says who may look, not who is looked at.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.tokens(call.tokens.clone(), false);
        visit::visit_macro(self, call);
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone(), true);
        }
        visit::visit_attribute(self, attribute);
    }
}
