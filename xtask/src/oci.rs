//! Owns the format of an OCI archive: one layer, one manifest, one index that names it (image-spec v1.1, image-layout.md).
//! Called by `image`.
//! Must never write a time, an owner or an order that depends on where it runs: the same files make the same bytes.

use std::collections::HashMap;

use anyhow::{Context, Result};
use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, ConfigBuilder, Descriptor, DescriptorBuilder, Digest, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
    SCHEMA_VERSION,
};
use serde::Serialize;

use crate::{checksum::sha256, tar_of::Files};

/// The time of every file: an image does not depend on when it was built.
const EPOCH: u64 = 0;

/// The archive of an image with this reference, entry point, `PATH` and layer.
pub(crate) fn archive(name: &str, entry: &[&str], path: &str, layer: &Files) -> Result<Vec<u8>> {
    let mut files = Files::default();
    let (layer, diff) = blob(&mut files, MediaType::ImageLayer, layer.tar(EPOCH)?)?;
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
    files.file("index.json", json(&index)?);
    let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
    files.file("oci-layout", json(&layout)?);
    files.tar(EPOCH)
}

/// JSON with sorted keys: the crate keeps annotations in a hash map.
fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&serde_json::to_value(value)?)?)
}

/// Adds a blob: its descriptor and its digest.
fn blob(files: &mut Files, kind: MediaType, bytes: Vec<u8>) -> Result<(Descriptor, String)> {
    let sum = sha256(&bytes);
    let digest = format!("sha256:{sum}");
    let descriptor = DescriptorBuilder::default()
        .media_type(kind)
        .digest(digest.parse::<Digest>().context("a digest")?)
        .size(u64::try_from(bytes.len())?)
        .build()?;
    files.file(&format!("blobs/sha256/{sum}"), bytes);
    Ok((descriptor, digest))
}

#[cfg(test)]
mod tests {
    use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

    use super::*;
    use crate::tar_of::tests::entries;

    fn image() -> Vec<u8> {
        let mut layer = Files::default();
        layer.program("usr/local/bin/guard", b"program".to_vec());
        layer.directory("proc");
        archive("localhost/guard:1.2.3", &["/usr/local/bin/guard"], "/usr/local/bin", &layer).expect("an image")
    }

    #[test]
    fn the_same_files_make_the_same_bytes() {
        // Annotations are in a hash map, whose order differs from one map to the next.
        let first = image();
        assert!((0..16).all(|_| image() == first));
    }

    #[test]
    fn each_blob_is_found_by_its_digest_from_the_index_on() {
        let files = entries(&image(), EPOCH);
        let file = |path: &str| &files.iter().find(|(name, ..)| name == path).expect("a file").2;
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
        let layer = entries(blob(digest), EPOCH);
        let paths: Vec<&str> = layer.iter().map(|(path, ..)| path.as_str()).collect();
        assert_eq!(paths, ["proc", "usr", "usr/local", "usr/local/bin", "usr/local/bin/guard"]);
    }
}
