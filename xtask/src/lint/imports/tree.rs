//! Owns the module tree of a crate, as its sources declare it.
//! Called by `imports`; `resolve` follows the paths in it.
//! Must never read test code: `#[cfg(test)]` items are left out, and with them every file that only such an item declares.

use anyhow::{Context, Result};
use syn::Item;

use super::module::{Module, collect, is_test, path_attribute};

/// The root of a crate, its modules and their files.
pub(crate) struct Tree {
    /// The files, as the names that they were read by.
    pub(crate) files: Vec<String>,
    /// The modules; the first is the root of the crate.
    pub(crate) modules: Vec<Module>,
}

/// Where the files of the modules that a module declares lie.
struct Place {
    /// The file that is being read.
    file: String,
    /// The directory of its child modules.
    children: String,
}

impl Tree {
    /// Reads the crate whose root is `root`; `source` returns the text of a file, if there is one.
    pub(crate) fn read(root: &str, source: &dyn Fn(&str) -> Option<String>) -> Result<Tree> {
        let mut tree = Tree { files: Vec::new(), modules: Vec::new() };
        let place = Place { file: root.to_owned(), children: directory(root) };
        tree.add_file(None, &place, source)?;
        Ok(tree)
    }

    fn add_file(
        &mut self,
        parent: Option<usize>,
        place: &Place,
        source: &dyn Fn(&str) -> Option<String>,
    ) -> Result<usize> {
        let text = source(&place.file).with_context(|| format!("{} does not exist", place.file))?;
        let parsed = syn::parse_file(&text).with_context(|| format!("cannot parse {}", place.file))?;
        self.files.push(place.file.clone());
        self.add_module(parent, self.files.len() - 1, &parsed.items, place, source)
    }

    fn add_module(
        &mut self,
        parent: Option<usize>,
        file: usize,
        items: &[Item],
        place: &Place,
        source: &dyn Fn(&str) -> Option<String>,
    ) -> Result<usize> {
        let index = self.modules.len();
        self.modules.push(Module { parent, file, ..Module::default() });
        for item in items.iter().filter(|item| !is_test(item)) {
            let Item::Mod(declared) = item else {
                collect(item, &mut self.modules[index]);
                continue;
            };
            let name = declared.ident.to_string();
            let child = if let Some((_, items)) = &declared.content {
                let inner = Place { file: place.file.clone(), children: format!("{}{name}/", place.children) };
                self.add_module(Some(index), file, items, &inner, source)?
            } else {
                let inner = place.child(&name, path_attribute(&declared.attrs), source);
                self.add_file(Some(index), &inner, source)?
            };
            self.modules[index].children.insert(name, child);
        }
        Ok(index)
    }
}

impl Place {
    /// The file of a child module: at the path of its `#[path]`, `name/mod.rs`, or `name.rs`.
    fn child(&self, name: &str, path: Option<String>, source: &dyn Fn(&str) -> Option<String>) -> Place {
        if let Some(path) = path {
            let file = normal(&format!("{}{path}", directory(&self.file)));
            return Place { children: directory(&file), file };
        }
        let children = format!("{}{name}/", self.children);
        let folder = format!("{children}mod.rs");
        let file = if source(&folder).is_some() { folder } else { format!("{}{name}.rs", self.children) };
        Place { file, children }
    }
}

/// The directory of a file, with a slash at its end unless it is empty.
fn directory(file: &str) -> String {
    file.rfind('/').map_or_else(String::new, |at| file[..=at].to_owned())
}

/// A path without `..`.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        if part == ".." {
            parts.pop();
        } else if part != "." {
            parts.push(part);
        }
    }
    parts.join("/")
}
