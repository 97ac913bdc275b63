//! Owns building the kernel objects: finds a compiler with matching sources of `core` and says which one it uses.
//! Called as `cargo xtask build-ebpf`, and by every task that builds the daemon.
//! Must never leave a stamp beside objects that it does not describe.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    shell::{command, find, read, root, run, say},
    stamp,
    tools::Tool,
};

/// The linker.
const BPF_LINKER: Tool = Tool { name: "bpf-linker", version: "0.10.3", optimised: true };
/// The LLVM that the linker is built on. It may not be able to read the bitcode of a compiler with another LLVM.
const LLVM: &str = "22";
/// The toolchain that the workspace names as its oldest.
const PINNED: &str = "1.95.0";

/// The objects: file name and features. The daemon contains the first, or the second with its feature `ebpf-log`; the others are for tests.
const OBJECTS: [(&str, &str); 5] = [
    ("guard.o", ""),
    ("guard-log.o", "log"),
    ("guard-other.o", "other-abi"),
    ("guard-dev.o", "probe"),
    ("guard-mutant.o", "probe,mutant"),
];

/// A compiler that can build for BPF.
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    about: String,
    libraries: Option<&'static str>,
}

/// Builds the objects, unless they exist and no source has changed.
pub(crate) fn build_ebpf(force: bool) -> Result<()> {
    let output = root().join(stamp::OUTPUT);
    let want = stamp::of(root()).context("cannot read the sources of the kernel object")?;
    let stamp_file = output.join(stamp::STAMP);
    let current = fs::read_to_string(&stamp_file).unwrap_or_default() == want
        && OBJECTS.iter().all(|(object, _)| output.join(object).is_file());
    if current && !force {
        return Ok(());
    }
    BPF_LINKER.install()?;
    let toolchain = find_toolchain()?;
    say(format!("kernel object: {}, bpf-linker {}", toolchain.about, BPF_LINKER.version));
    fs::create_dir_all(&output)?;
    remove(&stamp_file)?;
    for (object, features) in OBJECTS {
        build_object(&toolchain, features)?;
        let built = root().join("target/bpf-build/bpfel-unknown-none/ebpf/guard");
        // The daemon's build script watches the object: an identical one is not written again, so that the daemon is not rebuilt.
        let (new, target) = (fs::read(&built)?, output.join(object));
        if fs::read(&target).ok().as_ref() != Some(&new) {
            fs::write(&target, &new)?;
        }
        say(format!("  {} ({} KiB)", target.display(), new.len() / 1024));
    }
    fs::write(&stamp_file, want)?;
    Ok(())
}

fn build_object(toolchain: &Toolchain, features: &str) -> Result<()> {
    let mut build = with(toolchain);
    build.args(["build", "--quiet", "--locked", "--package", "guard-ebpf", "--bin", "guard", "--profile", "ebpf"]);
    build.args(["--target", "bpfel-unknown-none", "-Zbuild-std=core", "--target-dir", "target/bpf-build"]);
    if !features.is_empty() {
        build.args(["--features", features]);
    }
    run(&mut build)
}

/// Runs clippy on the kernel programs as they are compiled for the kernel.
pub(crate) fn clippy() -> Result<()> {
    let toolchain = find_toolchain()?;
    let driver = toolchain.cargo.with_file_name("cargo-clippy");
    if !driver.is_file() {
        bail!("{} has no clippy: run `cargo xtask setup`", toolchain.about);
    }
    for (_, features) in OBJECTS {
        let mut clippy = with(&toolchain);
        clippy.args(["clippy", "--quiet", "--locked", "--package", "guard-ebpf", "--target", "bpfel-unknown-none"]);
        clippy.args(["-Zbuild-std=core", "--target-dir", "target/bpf-build", "--features", features]);
        run(clippy.args(["--", "-D", "warnings"]))?;
    }
    Ok(())
}

fn with(toolchain: &Toolchain) -> Command {
    let mut build = command(&toolchain.cargo);
    let directory = toolchain.cargo.parent().unwrap_or(Path::new("/usr/bin"));
    let path = std::env::join_paths(
        std::iter::once(directory.to_path_buf()).chain(
            build
                .get_envs()
                .find(|(name, _)| *name == "PATH")
                .and_then(|(_, path)| path)
                .map(std::env::split_paths)
                .into_iter()
                .flatten(),
        ),
    )
    .unwrap_or_default();
    build.env("PATH", path).env("RUSTC", &toolchain.rustc);
    // `-Z build-std` is the only unstable feature in the build; the compiler itself is a stable one.
    build.env("RUSTC_BOOTSTRAP", "1");
    build
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    if let Some(libraries) = toolchain.libraries {
        build.env("LD_LIBRARY_PATH", libraries);
    }
    build
}

/// Tries the compilers in the order of preference and uses the first that fits. If none does, the error says why for each.
fn find_toolchain() -> Result<Toolchain> {
    let mut refused = Vec::new();
    for name in [None, Some(PINNED)] {
        match from_rustup(name) {
            Ok(toolchain) => return Ok(toolchain),
            Err(error) => refused.push(format!("{error:#}")),
        }
    }
    match from_debian() {
        Ok(toolchain) => Ok(toolchain),
        Err(error) => {
            refused.push(format!("{error:#}"));
            bail!(
                "no compiler with matching sources of `core` (LLVM {LLVM}):\n  - {}\nRun `cargo xtask setup`, or install one of:\n  rustup toolchain install {PINNED} --component rust-src\n  apt-get install rustc-web cargo-web rust-web-src",
                refused.join("\n  - ")
            )
        }
    }
}

/// A toolchain of rustup: the active one, or the pinned one by name. The sources of `core` are a component, which is added if it is missing.
fn from_rustup(name: Option<&str>) -> Result<Toolchain> {
    let rustup = find("rustup").context("rustup is not installed")?;
    let mut which = command(&rustup);
    which.args(["which", "rustc"]);
    if let Some(name) = name {
        which.args(["--toolchain", name]);
    }
    let rustc = PathBuf::from(read(&mut which)?);
    let version = check_llvm(&rustc)?;
    let sysroot = rustc.parent().and_then(Path::parent).context("rustc is in no toolchain directory")?;
    if !has_core(sysroot) {
        let directory = sysroot.file_name().context("a toolchain has a name")?;
        read(command(&rustup).args(["component", "add", "rust-src", "--toolchain"]).arg(directory))
            .with_context(|| format!("rustc {version} of rustup has no sources of `core`, and they cannot be added"))?;
    }
    let about = format!("rustc {version} of rustup");
    Ok(Toolchain { cargo: sysroot.join("bin/cargo"), rustc: rustc.clone(), about, libraries: None })
}

/// Debian's newest Rust, which Debian maintains to build browsers.
fn from_debian() -> Result<Toolchain> {
    let rustc = PathBuf::from("/usr/bin/rustc");
    let version = check_llvm(&rustc)?;
    if !has_core(Path::new("/usr")) {
        bail!("rustc {version} of Debian has no sources of `core` (package rust-web-src)");
    }
    let libraries = Some("/usr/lib/x86_64-linux-gnu");
    Ok(Toolchain { cargo: "/usr/bin/cargo".into(), rustc, about: format!("rustc {version} of Debian"), libraries })
}

fn check_llvm(rustc: &Path) -> Result<String> {
    let about = read(command(rustc).arg("-vV"))?;
    let field =
        |name: &str| about.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    let (version, llvm) = (field("release:"), field("LLVM version:"));
    if llvm.split('.').next() != Some(LLVM) {
        bail!("rustc {version} at {} has LLVM {llvm}", rustc.display());
    }
    Ok(version)
}

fn has_core(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
