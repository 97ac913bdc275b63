//! Owns the format of an OCI archive: one layer, one manifest, one index that names it (image-spec v1.1, image-layout.md).
//! Called by `image`.
//! Must never write a time, an owner or an order that depends on where it runs: the same files make the same bytes.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result};
use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, ConfigBuilder, Descriptor, DescriptorBuilder, Digest, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
    SCHEMA_VERSION,
};
use serde::Serialize;
use tar::{Builder, EntryType, Header};

use crate::checksum::sha256;

/// The files of a layer by path, in the order in which they are written.
#[derive(Default)]
pub(crate) struct Layer(BTreeMap<String, Entry>);

enum Entry {
    Directory,
    File { mode: u32, bytes: Vec<u8> },
    Link { target: String },
}

impl Layer {
    /// Adds a file that can be executed.
    pub(crate) fn program(&mut self, path: &str, bytes: Vec<u8>) {
        self.add(path, Entry::File { mode: 0o755, bytes });
    }

    /// Adds a text file.
    pub(crate) fn text(&mut self, path: &str, text: &str) {
        self.add(path, Entry::File { mode: 0o644, bytes: text.into() });
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

    fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            let (mut header, bytes) = (Header::new_ustar(), Vec::new());
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            let (kind, mode, bytes) = match entry {
                Entry::Directory => (EntryType::Directory, 0o755, &bytes),
                Entry::File { mode, bytes } => (EntryType::Regular, *mode, bytes),
                Entry::Link { .. } => (EntryType::Symlink, 0o777, &bytes),
            };
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_size(u64::try_from(bytes.len())?);
            match entry {
                Entry::Link { target } => tar.append_link(&mut header, path, target)?,
                Entry::Directory | Entry::File { .. } => tar.append_data(&mut header, path, bytes.as_slice())?,
            }
        }
        Ok(tar.into_inner()?)
    }
}

/// The archive of an image with this reference, entry point, `PATH` and layer.
pub(crate) fn archive(name: &str, entry: &[&str], path: &str, layer: Layer) -> Result<Vec<u8>> {
    let mut files = Layer::default();
    let (layer, diff) = blob(&mut files, MediaType::ImageLayer, layer.tar()?)?;
    let config = ConfigBuilder::default()
        .entrypoint(entry.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
        .env([format!("PATH={path}")])
        .working_dir("/")
        .build()?;
    let config = ImageConfigurationBuilder::default()
        .architecture(Arch::Amd64)
        .os(Os::Linux)
        .config(config)
        .rootfs(RootFsBuilder::default().typ("layers").diff_ids([diff]).build()?)
        .build()?;
    let (config, _) = blob(&mut files, MediaType::ImageConfig, json(&config)?)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(config)
        .layers([layer])
        .build()?;
    let (mut manifest, _) = blob(&mut files, MediaType::ImageManifest, json(&manifest)?)?;
    manifest.set_platform(Some(PlatformBuilder::default().architecture(Arch::Amd64).os(Os::Linux).build()?));
    // The tag for OCI tools, and the whole reference for containerd.
    let tag = name.rsplit(':').next().unwrap_or_default();
    manifest.set_annotations(Some(HashMap::from([
        (ANNOTATION_REF_NAME.to_owned(), tag.to_owned()),
        ("io.containerd.image.name".to_owned(), name.to_owned()),
    ])));
    let index = ImageIndexBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageIndex)
        .manifests([manifest])
        .build()?;
    files.add("index.json", Entry::File { mode: 0o644, bytes: json(&index)? });
    let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
    files.add("oci-layout", Entry::File { mode: 0o644, bytes: json(&layout)? });
    files.tar()
}

/// JSON with sorted keys: the crate keeps annotations in a hash map.
fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&serde_json::to_value(value)?)?)
}

/// Adds a blob: its descriptor and its digest.
fn blob(files: &mut Layer, kind: MediaType, bytes: Vec<u8>) -> Result<(Descriptor, String)> {
    let sum = sha256(&bytes);
    let digest = format!("sha256:{sum}");
    let descriptor = DescriptorBuilder::default()
        .media_type(kind)
        .digest(digest.parse::<Digest>().context("a digest")?)
        .size(u64::try_from(bytes.len())?)
        .build()?;
    files.add(&format!("blobs/sha256/{sum}"), Entry::File { mode: 0o644, bytes });
    Ok((descriptor, digest))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

    use super::*;

    fn layer() -> Layer {
        let mut layer = Layer::default();
        layer.program("usr/local/bin/guard", b"program".to_vec());
        layer.text("etc/nsswitch.conf", "hosts: files dns\n");
        layer.link("bin/sh", "../usr/local/bin/guard");
        layer.directory("proc");
        layer
    }

    fn image() -> Vec<u8> {
        archive("localhost/guard:1.2.3", &["/usr/local/bin/guard"], "/usr/local/bin", layer()).expect("an image")
    }

    /// The entries of an archive: path, kind and mode, bytes.
    fn entries(archive: &[u8]) -> Vec<(String, EntryType, u32, Vec<u8>)> {
        let mut archive = tar::Archive::new(archive);
        let entry = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.expect("an entry");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("its bytes");
            let header = entry.header();
            assert_eq!((header.uid().ok(), header.gid().ok(), header.mtime().ok()), (Some(0), Some(0), Some(0)));
            let path = entry.path().expect("its path").display().to_string();
            (path, header.entry_type(), header.mode().expect("its mode"), bytes)
        };
        archive.entries().expect("an archive").map(entry).collect()
    }

    #[test]
    fn the_same_files_make_the_same_bytes() {
        // Annotations are in a hash map, whose order differs from one to the next.
        let first = image();
        assert!((0..16).all(|_| image() == first));
    }

    #[test]
    fn each_blob_is_found_by_its_digest_from_the_index_on() {
        let archive = image();
        let entries = entries(&archive);
        let file = |path: &str| &entries.iter().find(|(name, ..)| name == path).expect("a file").3;
        let blob = |digest: &str| {
            let bytes = file(&format!("blobs/sha256/{}", digest.trim_start_matches("sha256:")));
            assert_eq!(format!("sha256:{}", sha256(bytes)), digest);
            bytes
        };
        assert_eq!(file("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#);
        let index = ImageIndex::from_reader(file("index.json").as_slice()).expect("an index");
        let manifest = &index.manifests()[0];
        let names = manifest.annotations().as_ref().expect("annotations");
        assert_eq!(names[ANNOTATION_REF_NAME], "1.2.3");
        assert_eq!(names["io.containerd.image.name"], "localhost/guard:1.2.3");
        let manifest = ImageManifest::from_reader(blob(manifest.digest().as_ref()).as_slice()).expect("a manifest");
        let config = blob(manifest.config().digest().as_ref());
        assert_eq!(manifest.config().size(), config.len() as u64);
        let config = ImageConfiguration::from_reader(config.as_slice()).expect("a configuration");
        let digest = manifest.layers()[0].digest().as_ref();
        assert_eq!(config.rootfs().diff_ids(), &[digest]);
        let started = config.config().as_ref().expect("what a container starts with");
        assert_eq!(started.entrypoint().as_deref(), Some(&["/usr/local/bin/guard".to_owned()][..]));
        let paths: Vec<String> = self::entries(blob(digest)).into_iter().map(|(path, ..)| path).collect();
        let want = ["bin", "bin/sh", "etc", "etc/nsswitch.conf", "proc", "usr", "usr/local", "usr/local/bin"];
        assert_eq!(
            paths.iter().map(|path| path.trim_end_matches('/')).collect::<Vec<_>>(),
            [&want[..], &["usr/local/bin/guard"]].concat()
        );
    }

    #[test]
    fn a_program_can_be_executed_and_a_text_cannot() {
        let modes: Vec<(String, u32)> =
            entries(&layer().tar().expect("a layer")).into_iter().map(|(path, _, mode, _)| (path, mode)).collect();
        assert!(modes.contains(&("usr/local/bin/guard".to_owned(), 0o755)), "{modes:?}");
        assert!(modes.contains(&("etc/nsswitch.conf".to_owned(), 0o644)), "{modes:?}");
    }
}
