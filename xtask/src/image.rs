//! Owns the guard's container image: `cargo xtask image` writes it as an OCI archive, from scratch, with one static binary.
//! Called as a task, by `release`, and by the cluster area, which also builds static programs for the images of its pods.
//! Must never need a container engine, a registry or a base image.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    build_ebpf, oci,
    shell::{command, find, root, run, say},
    tar_of::Files,
};

/// What goes into an image.
pub(crate) struct Image<'a> {
    /// Its whole reference: registry, repository, tag.
    pub(crate) name: &'a str,
    /// Programs, and their paths in the image.
    pub(crate) files: &'a [(&'a Path, &'a str)],
    /// Paths of small text files, and their text.
    pub(crate) texts: &'a [(&'a str, &'a str)],
    /// Symbolic links and their targets.
    pub(crate) links: &'a [(&'a str, &'a str)],
    /// The entry point.
    pub(crate) entry: &'a [&'a str],
    /// `PATH` in a container.
    pub(crate) path: &'a str,
}

/// What a static binary is built for.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the guard statically and writes its image; returns the path of the archive.
pub(crate) fn guard() -> Result<PathBuf> {
    build_ebpf::build_ebpf(false)?;
    let archive = root().join("target/image/nodeguard.tar");
    let name = format!("localhost/nodeguard:{}", env!("CARGO_PKG_VERSION"));
    let image = Image {
        name: &name,
        files: &[(&binary()?, "usr/local/bin/nodeguard")],
        // Without this file the C library asks name servers first and /etc/hosts never.
        texts: &[("etc/nsswitch.conf", "hosts: files dns\n")],
        links: &[],
        entry: &["/usr/local/bin/nodeguard"],
        path: "/usr/local/bin",
    };
    write(&image, &archive)?;
    Ok(archive)
}

/// Builds the guard statically; returns the path of the binary.
pub(crate) fn binary() -> Result<PathBuf> {
    static_binary("nodeguard", "nodeguard")
}

/// Builds a program for release that needs no other file at run time; returns the path of the binary.
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

/// Writes an image as an OCI archive.
pub(crate) fn write(image: &Image<'_>, archive: &Path) -> Result<()> {
    let mut layer = Files::default();
    for (from, to) in image.files {
        layer.program(to, fs::read(from).with_context(|| from.display().to_string())?);
    }
    for (path, text) in image.texts {
        layer.file(path, (*text).into());
    }
    for (path, target) in image.links {
        layer.link(path, target);
    }
    // The mount points of volumes: a container with a read-only root cannot create them.
    for directory in ["etc", "proc", "run", "sys", "tmp"] {
        layer.directory(directory);
    }
    fs::create_dir_all(archive.parent().context("an archive is in a directory")?)?;
    let bytes = oci::archive(image.name, image.entry, image.path, &layer)?;
    fs::write(archive, bytes).with_context(|| archive.display().to_string())
}
