//! Owns writing archives whose bytes depend on nothing but the files: sorted, without owner, with one time for all.
//! Called by `oci` for images and by `release` for the manifests.
//! Must never follow a link or take a mode, an owner or a time from the file system.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use tar::{Builder, EntryType, Header};

/// The files of an archive by path, in the order in which they are written.
#[derive(Default)]
pub(crate) struct Files(BTreeMap<String, Entry>);

enum Entry {
    Directory,
    File { mode: u32, bytes: Vec<u8> },
    Link { target: String },
}

impl Files {
    /// Adds a file that can be executed.
    pub(crate) fn program(&mut self, path: &str, bytes: Vec<u8>) {
        self.add(path, Entry::File { mode: 0o755, bytes });
    }

    /// Adds a file that cannot be executed.
    pub(crate) fn file(&mut self, path: &str, bytes: Vec<u8>) {
        self.add(path, Entry::File { mode: 0o644, bytes });
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.add(path, Entry::Link { target: target.to_owned() });
    }

    /// Adds a directory.
    pub(crate) fn directory(&mut self, path: &str) {
        self.add(path, Entry::Directory);
    }

    fn add(&mut self, path: &str, entry: Entry) {
        for (end, _) in path.match_indices('/') {
            self.0.entry(path[..end].to_owned()).or_insert(Entry::Directory);
        }
        self.0.insert(path.to_owned(), entry);
    }

    /// The archive; every entry has this time, in seconds since 1970.
    pub(crate) fn tar(&self, epoch: u64) -> Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            let (mut header, none) = (Header::new_ustar(), Vec::new());
            let (kind, mode, bytes) = match entry {
                Entry::Directory => (EntryType::Directory, 0o755, &none),
                Entry::File { mode, bytes } => (EntryType::Regular, *mode, bytes),
                Entry::Link { .. } => (EntryType::Symlink, 0o777, &none),
            };
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(epoch);
            header.set_size(u64::try_from(bytes.len())?);
            match entry {
                Entry::Link { target } => tar.append_link(&mut header, path, target)?,
                Entry::Directory | Entry::File { .. } => tar.append_data(&mut header, path, bytes.as_slice())?,
            }
        }
        Ok(tar.into_inner()?)
    }
}

/// The archive of a directory; `name` is what it is called in the archive.
pub(crate) fn folder(directory: &Path, name: &str, epoch: u64) -> Result<Vec<u8>> {
    let mut files = Files::default();
    collect(directory, name, &mut files)?;
    files.tar(epoch)
}

fn collect(directory: &Path, name: &str, files: &mut Files) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        let path = format!("{name}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &path, files)?;
        } else {
            files.file(&path, fs::read(entry.path())?);
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Read;

    use super::*;

    /// The entries of an archive: path, mode, bytes.
    pub(crate) fn entries(archive: &[u8], epoch: u64) -> Vec<(String, u32, Vec<u8>)> {
        let mut archive = tar::Archive::new(archive);
        let entry = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.expect("an entry");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("its bytes");
            let header = entry.header();
            assert_eq!((header.uid().ok(), header.gid().ok(), header.mtime().ok()), (Some(0), Some(0), Some(epoch)));
            let path = entry.path().expect("its path").display().to_string();
            (path.trim_end_matches('/').to_owned(), header.mode().expect("its mode"), bytes)
        };
        archive.entries().expect("an archive").map(entry).collect()
    }

    #[test]
    fn entries_are_sorted_and_their_folders_come_first() {
        let mut files = Files::default();
        files.program("usr/bin/guard", b"program".to_vec());
        files.file("etc/hosts", b"text".to_vec());
        files.link("bin/sh", "../usr/bin/guard");
        files.directory("proc");
        let got = entries(&files.tar(7).expect("an archive"), 7);
        let got: Vec<(&str, u32, &[u8])> =
            got.iter().map(|(path, mode, bytes)| (path.as_str(), *mode, bytes.as_slice())).collect();
        let want: [(&str, u32, &[u8]); 8] = [
            ("bin", 0o755, b""),
            ("bin/sh", 0o777, b""),
            ("etc", 0o755, b""),
            ("etc/hosts", 0o644, b"text"),
            ("proc", 0o755, b""),
            ("usr", 0o755, b""),
            ("usr/bin", 0o755, b""),
            ("usr/bin/guard", 0o755, b"program"),
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn a_folder_has_its_files_and_the_time_that_was_asked_for() {
        let deploy = crate::shell::root().join("deploy");
        let got = entries(&folder(&deploy, "deploy", 1_700_000_000).expect("an archive"), 1_700_000_000);
        let manifest = got.iter().find(|(path, ..)| path == "deploy/daemonset.yaml").expect("the manifest");
        assert_eq!(manifest.2, fs::read(deploy.join("daemonset.yaml")).expect("the manifest"));
        assert!(got.iter().any(|(path, ..)| path == "deploy/policies/worker.yaml"));
    }
}
