//! Owns which file defines what a path names, through modules, re-exports and globs, as far as the sources show it.
//! Called by `imports` for the edges between files.
//! Must never follow a path out of the crate: a name that no module of it has belongs to another crate.

use std::collections::BTreeMap;

use super::{module::Module, tree::Tree};

/// Re-exports of re-exports; more than any crate here has.
const DEEPEST: usize = 16;

/// The imports between files: from which file, to which; each item with the first line that names it.
pub(crate) type Edges = BTreeMap<(String, String), BTreeMap<String, usize>>;

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// A module itself, which is a name space: importing it alone imports nothing from its file.
    Module(usize),
    /// Something that this module defines.
    Item(usize),
}

/// Every import of a file of the crate from another one.
pub(crate) fn edges(tree: &Tree) -> Edges {
    let mut edges = Edges::new();
    for (index, module) in tree.modules.iter().enumerate() {
        let imports = module.imports.iter().map(|import| (&import.from, import.name.is_none()));
        for (mention, glob) in imports.chain(module.mentions.iter().map(|mention| (mention, false))) {
            let target = tree.resolve(index, &mention.path, 0);
            let (owner, item) = match target {
                Some(Target::Item(owner)) => (owner, tree.item(index, &mention.path)),
                Some(Target::Module(owner)) if glob => (owner, "*".to_owned()),
                _ => continue,
            };
            let (from, to) = (module.file, tree.modules[owner].file);
            if from != to {
                let edge = edges.entry((tree.files[from].clone(), tree.files[to].clone())).or_default();
                let line = edge.entry(item).or_insert(mention.line);
                *line = mention.line.min(*line);
            }
        }
    }
    edges
}

impl Tree {
    /// What a path names that stands in the module `from`.
    fn resolve(&self, from: usize, path: &[String], depth: usize) -> Option<Target> {
        let (first, mut rest) = path.split_first()?;
        let mut target = match first.as_str() {
            "crate" => Target::Module(0),
            "self" => Target::Module(from),
            "super" => {
                let mut module = self.modules[from].parent?;
                while let Some(("super", more)) = rest.split_first().map(|(word, more)| (word.as_str(), more)) {
                    (module, rest) = (self.modules[module].parent?, more);
                }
                Target::Module(module)
            }
            name => self.member(from, name, rest.is_empty(), depth)?,
        };
        for (at, name) in rest.iter().enumerate() {
            let Target::Module(module) = target else { break };
            // A name that no source shows comes from a macro in that module.
            target = self.member(module, name, at + 1 == rest.len(), depth).unwrap_or(Target::Item(module));
        }
        Some(target)
    }

    /// What a name in a module is. A module and an item can share a name: the item is meant at the end of a path.
    fn member(&self, module: usize, name: &str, last: bool, depth: usize) -> Option<Target> {
        let Module { children, defined, imports, .. } = &self.modules[module];
        if depth > DEEPEST {
            return None;
        }
        if defined.contains(name) && (last || !children.contains_key(name)) {
            return Some(Target::Item(module));
        }
        if let Some(child) = children.get(name) {
            return Some(Target::Module(*child));
        }
        let named = imports.iter().filter(|import| import.name.as_deref() == Some(name));
        if let Some(target) = named.map(|import| &import.from.path).find_map(|path| self.follow(module, path, depth)) {
            return Some(target);
        }
        let globs = imports.iter().filter(|import| import.name.is_none());
        globs.map(|import| &import.from.path).find_map(|path| match self.follow(module, path, depth)? {
            Target::Module(other) if other != module => self.member(other, name, last, depth + 1),
            Target::Module(_) | Target::Item(_) => None,
        })
    }

    /// Where an import leads. A path of one word that is no module here is another crate.
    fn follow(&self, module: usize, path: &[String], depth: usize) -> Option<Target> {
        match path {
            [name] if !["crate", "self", "super"].contains(&name.as_str()) => {
                self.modules[module].children.get(name).map(|child| Target::Module(*child))
            }
            path => self.resolve(module, path, depth + 1),
        }
    }

    /// The item that a path names, for people: the part below the last module.
    fn item(&self, from: usize, path: &[String]) -> String {
        let modules = (1..path.len())
            .rev()
            .find(|end| matches!(self.resolve(from, &path[..*end], 0), Some(Target::Module(_))))
            .unwrap_or(0);
        path[modules..].first().cloned().unwrap_or_default()
    }
}
