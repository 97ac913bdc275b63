//! Owns container images: `cargo xtask image` writes the guard's as an OCI archive, from scratch, with one static binary.
//! Called as a task, and by the cluster area for the guard's image and those of the lab's pods.
//! Must never need a container engine, a registry or a base image; the same files make the same bytes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    build_ebpf,
    shell::{command, find, read, root, run, say},
};

/// What goes into an image.
pub(crate) struct Image<'a> {
    /// Its whole reference: registry, repository, tag.
    pub(crate) name: &'a str,
    /// Programs, and where they are in it.
    pub(crate) files: &'a [(&'a Path, &'a str)],
    /// Small text files.
    pub(crate) texts: &'a [(&'a str, &'a str)],
    /// Symbolic links and what they say.
    pub(crate) links: &'a [(&'a str, &'a str)],
    /// The entry point.
    pub(crate) entry: &'a [&'a str],
    /// `PATH` in it.
    pub(crate) path: &'a str,
}

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the guard statically and writes its image; where that is.
pub(crate) fn guard() -> Result<PathBuf> {
    build_ebpf::build_ebpf(false)?;
    let binary = static_binary("nodeguard", "nodeguard")?;
    let archive = root().join("target/image/nodeguard.tar");
    let name = format!("localhost/nodeguard:{}", env!("CARGO_PKG_VERSION"));
    let image = Image {
        name: &name,
        files: &[(&binary, "usr/local/bin/nodeguard")],
        // Without this file the C library asks name servers first and /etc/hosts never.
        texts: &[("etc/nsswitch.conf", "hosts: files dns\n")],
        links: &[],
        entry: &["/usr/local/bin/nodeguard"],
        path: "/usr/local/bin",
    };
    write(&image, &archive)?;
    Ok(archive)
}

/// Builds a program that needs no file beside itself.
pub(crate) fn static_binary(package: &str, program: &str) -> Result<PathBuf> {
    let mut build = command(find("cargo").context("cargo is not in PATH")?);
    build.args(["build", "--quiet", "--locked", "--release", "--package", package, "--bin", program]);
    run(build.args(["--target", TARGET]).env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(root().join("target").join(TARGET).join("release").join(program))
}

/// `cargo xtask image`.
pub(crate) fn image() -> Result<()> {
    let archive = guard()?;
    let size = fs::metadata(&archive)?.len() / 1_000_000;
    say(format!(
        "{} ({size} MB). On a node: ctr -n k8s.io images import {}",
        archive.display(),
        archive.file_name().unwrap_or_default().to_string_lossy()
    ));
    Ok(())
}

/// Writes an OCI archive (image-spec v1.1, image-layout.md): one layer, one manifest, one index that names it.
pub(crate) fn write(image: &Image<'_>, archive: &Path) -> Result<()> {
    let place = archive.with_extension("image");
    let _ = fs::remove_dir_all(&place);
    let (tree, layout) = (place.join("tree"), place.join("layout"));
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let below = |path: &str| -> Result<PathBuf> {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().context("a file stands in a directory")?)?;
        Ok(path)
    };
    for (from, to) in image.files {
        fs::copy(from, below(to)?).with_context(|| from.display().to_string())?;
    }
    for (path, text) in image.texts {
        fs::write(below(path)?, text)?;
    }
    for (path, to) in image.links {
        std::os::unix::fs::symlink(to, below(path)?)?;
    }
    // Where volumes are mounted: a read-only root cannot make them.
    for directory in ["etc", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(directory))?;
    }

    let layer = place.join("layer.tar");
    tar(&tree, &layer)?;
    let (layer, layer_size) = blob(&layout, &layer)?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Entrypoint": image.entry, "Env": [format!("PATH={}", image.path)], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
    });
    let (config, config_size) = json_blob(&layout, &place, &config)?;
    let kind = |name: &str| format!("application/vnd.oci.image.{name}");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind("manifest.v1+json"),
        "config": {"mediaType": kind("config.v1+json"), "digest": format!("sha256:{config}"), "size": config_size},
        "layers": [{"mediaType": kind("layer.v1.tar"), "digest": format!("sha256:{layer}"), "size": layer_size}],
    });
    let (manifest, manifest_size) = json_blob(&layout, &place, &manifest)?;
    let tag = image.name.rsplit(':').next().unwrap_or_default();
    let index = json!({
        "schemaVersion": 2, "mediaType": kind("index.v1+json"),
        "manifests": [{
            "mediaType": kind("manifest.v1+json"), "digest": format!("sha256:{manifest}"), "size": manifest_size,
            "platform": {"architecture": "amd64", "os": "linux"},
            "annotations": {"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": image.name},
        }],
    });
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    tar(&layout, archive)?;
    Ok(fs::remove_dir_all(place)?)
}

/// A directory as an archive that holds no trace of when, where and by whom it was made.
fn tar(directory: &Path, archive: &Path) -> Result<()> {
    let mut tar = command("tar");
    tar.args(["--create", "--format=ustar", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0"]);
    run(tar.arg("--file").arg(archive).arg("--directory").arg(directory).arg("."))
}

/// Moves a file among the blobs: its digest and size.
fn blob(layout: &Path, file: &Path) -> Result<(String, u64)> {
    let sum = read(command("sha256sum").arg(file))?;
    let digest = sum.split(' ').next().unwrap_or_default().to_owned();
    let size = fs::metadata(file)?.len();
    fs::rename(file, layout.join("blobs/sha256").join(&digest))?;
    Ok((digest, size))
}

fn json_blob(layout: &Path, place: &Path, value: &Value) -> Result<(String, u64)> {
    let file = place.join("blob");
    fs::write(&file, serde_json::to_vec(value)?)?;
    blob(layout, &file)
}
