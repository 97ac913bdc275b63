//! Owns `cargo xtask release`: writes everything that a release consists of into `dist/`, and verifies it.
//! Called as a task; RELEASING.md describes the steps around it.
//! Must never sign, tag, push or upload: it prints the commands that do.

mod changelog;
mod sbom;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{
    build_ebpf, checksum, image,
    shell::{command, read, root, say},
    tar_of,
};

/// The version of every crate of the workspace.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The file of checksums.
const SUMS: &str = "SHA256SUMS";

/// Builds the files of a release. `dirty` permits changes that are not committed.
pub(crate) fn release(dirty: bool) -> Result<()> {
    let changes = read(command("git").args(["status", "--porcelain"]))?;
    if !changes.is_empty() && !dirty {
        bail!("a release is made from a commit, and these files differ from it (`--dirty` builds anyway):\n{changes}");
    }
    let changelog = fs::read_to_string(root().join("CHANGELOG.md")).context("CHANGELOG.md")?;
    let section = changelog::section(&changelog, VERSION)?;
    let epoch = epoch()?;
    let dist = root().join("dist");
    if dist.exists() {
        fs::remove_dir_all(&dist).with_context(|| dist.display().to_string())?;
    }
    fs::create_dir_all(&dist)?;
    let mut files = Files { dist, sums: String::new() };

    say(format!("Nodeguard {VERSION}, times are {epoch} s after 1970 (SOURCE_DATE_EPOCH)"));
    build_ebpf::build_ebpf(false)?;
    let archive = image::guard()?;
    files.add(&name("x86_64-linux"), &fs::read(image::binary()?)?)?;
    files.add(&name("image-amd64.tar"), &fs::read(archive)?)?;
    files.add(&name("deploy.tar"), &tar_of::folder(&root().join("deploy"), "deploy", epoch)?)?;
    files.add(&name("sbom.cdx.json"), &sbom::of_the_guard(epoch)?)?;
    files.add("CHANGES.md", section.as_bytes())?;
    fs::write(files.dist.join(SUMS), &files.sums)?;

    let sums = fs::read_to_string(files.dist.join(SUMS))?;
    let verified = checksum::verify(&sums, |file| fs::read(files.dist.join(file)))?;
    say(format!("{verified} files in {} match {SUMS}\n\n{}", files.dist.display(), left(VERSION)));
    Ok(())
}

/// The directory of the release, and the checksums of what is in it.
struct Files {
    dist: PathBuf,
    sums: String,
}

impl Files {
    fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path: PathBuf = self.dist.join(name);
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
        if name.ends_with("-linux") {
            executable(&path)?;
        }
        self.sums.push_str(&checksum::line(name, bytes));
        say(format!("  {name} ({} KiB)", bytes.len().div_ceil(1024)));
        Ok(())
    }
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn name(rest: &str) -> String {
    format!("nodeguard-{VERSION}-{rest}")
}

/// The time that the files carry: SOURCE_DATE_EPOCH, or the time of the commit.
fn epoch() -> Result<u64> {
    let text = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => read(command("git").args(["log", "-1", "--format=%ct"]))?,
    };
    text.parse().with_context(|| format!("SOURCE_DATE_EPOCH is `{text}`, which is not a number of seconds"))
}

/// What a release still needs after this task, with the commands.
fn left(version: &str) -> String {
    format!(
        "Not done, because it needs keys, a registry or a decision:\n  \
         tag      git tag --sign v{version} --message \"Nodeguard {version}\"\n  \
         sign     (cd dist && gpg --armor --detach-sign {SUMS})\n  \
         image    skopeo copy oci-archive:dist/nodeguard-{version}-image-amd64.tar docker://REGISTRY/nodeguard:{version}\n           \
         cosign sign REGISTRY/nodeguard:{version}\n  \
         publish  git push origin v{version}, then upload the files of dist/ and {SUMS}.asc\n\
         RELEASING.md has the whole list."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_names_every_step_that_needs_a_key_or_a_registry() {
        let left = left("1.2.3");
        for step in
            ["git tag --sign v1.2.3", "gpg", "skopeo copy oci-archive:dist/nodeguard-1.2.3-image-amd64.tar", "cosign"]
        {
            assert!(left.contains(step), "{step} is missing:\n{left}");
        }
    }

    #[test]
    fn the_changelog_of_this_version_exists() {
        let changelog = fs::read_to_string(root().join("CHANGELOG.md")).expect("CHANGELOG.md");
        assert!(changelog::section(&changelog, VERSION).is_ok());
    }
}
