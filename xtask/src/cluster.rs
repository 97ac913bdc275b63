//! Owns building a whole Kubernetes from its Go modules, and the small images of the cluster's pods.
//! Called by `setup` for the cluster area; the cluster lab starts what this leaves in `target/cluster`.
//! Must never build other versions than those that the go.sum of the module pins.

use std::fs;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::{
    image::{self, Image},
    shell::{command, find, read, root, run, say},
    upstream,
};

/// A minor version of Kubernetes. Each has a Go module below tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kubernetes {
    /// The version that every test runs with
    #[default]
    #[value(name = "v1.34")]
    V1_34,
    /// The newest version that builds with Go 1.26
    #[value(name = "v1.37")]
    V1_37,
}

impl Kubernetes {
    /// The version that the go.mod requires and that the programs print.
    fn version(self) -> &'static str {
        match self {
            Kubernetes::V1_34 => "v1.34.4",
            Kubernetes::V1_37 => "v1.37.2",
        }
    }

    /// The folder of the module below tests, and of the programs below target.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Kubernetes::V1_34 => "cluster",
            Kubernetes::V1_37 => "cluster-v1.37",
        }
    }
}

/// The programs and their packages, ordered so that each shares as much compiled code as possible with the one before.
const PROGRAMS: [(&str, &str); 7] = [
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
];

/// Builds the programs of Kubernetes and etcd that are missing.
pub(crate) fn kubernetes(kubernetes: Kubernetes) -> Result<()> {
    PROGRAMS.iter().try_for_each(|(program, package)| build(kubernetes, program, package))
}

/// Builds one program, unless the existing one was built from the same module file. One package at a time, to leave the machine usable.
fn build(kubernetes: Kubernetes, program: &str, package: &str) -> Result<()> {
    let (folder, kubernetes) = (kubernetes.folder(), kubernetes.version());
    let (module, output) = (root().join("tests").join(folder), root().join("target").join(folder));
    let (binary, built_from) = (output.join(program), output.join(format!("{program}.go.sum")));
    let sums = fs::read(module.join("go.sum")).with_context(|| module.display().to_string())?;
    if binary.is_file() && fs::read(&built_from).ok().as_ref() == Some(&sums) {
        return Ok(());
    }
    say(format!(
        "  {program} of Kubernetes {kubernetes} (a Go build; all seven together take about a quarter of an hour on two cores)"
    ));
    fs::create_dir_all(&output)?;
    let minor = kubernetes.split('.').nth(1).unwrap_or_default();
    let version = "k8s.io/component-base/version.git";
    let link = format!("-ldflags=-s -w -X {version}Version={kubernetes} -X {version}Major=1 -X {version}Minor={minor}");
    let mut build = command(find("go").context("Go is not installed")?);
    build.current_dir(&module).env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=readonly -p=1");
    run(build.args(["build", "-trimpath", &link, "-o"]).arg(&binary).arg(package))?;
    // If the program does not start, fail here and not in a lab.
    read(command(&binary).arg("--help"))?;
    Ok(fs::write(built_from, sums)?)
}

/// Writes the image of the upstream agent, which the bench compares with.
pub(crate) fn agent_image() -> Result<()> {
    upstream::agent()?;
    let image = Image {
        name: "localhost/proxy-agent:lab",
        files: &[(&root().join("target/upstream/proxy-agent"), "proxy-agent")],
        texts: &[],
        links: &[],
        entry: &["/proxy-agent"],
        path: "/",
    };
    image::write(&image, &root().join("target/cluster/proxy-agent.tar"))
}

/// Writes the images of the lab's pods. They contain one static program, under each of its names.
pub(crate) fn pod_images() -> Result<()> {
    let busybox = find("busybox").context("busybox is not installed (package busybox-static)")?;
    let names = read(command(&busybox).arg("--list"))?;
    let paths: Vec<String> =
        names.lines().filter(|name| *name != "busybox").map(|name| format!("bin/{name}")).collect();
    let links: Vec<(&str, &str)> = paths.iter().map(|path| (path.as_str(), "busybox")).collect();
    for (name, entry) in [("pause", &["/bin/sleep", "1000000000"][..]), ("busybox", &["/bin/sh"])] {
        let image = Image {
            name: &format!("localhost/{name}:lab"),
            files: &[(&busybox, "bin/busybox")],
            texts: &[("etc/passwd", "root:x:0:0:root:/:/bin/sh\n")],
            links: &links,
            entry,
            path: "/bin",
        };
        image::write(&image, &root().join(format!("target/cluster/{name}.tar")))?;
    }
    Ok(())
}

/// Writes the image of the pod that serves a webhook and an aggregated API.
pub(crate) fn hook_image() -> Result<()> {
    let binary = image::static_binary("nodeguard-tests", "nodeguard-pod")?;
    let image = Image {
        name: "localhost/hook:lab",
        files: &[(&binary, "bin/hook")],
        texts: &[],
        links: &[],
        entry: &["/bin/hook"],
        path: "/bin",
    };
    image::write(&image, &root().join("target/cluster/hook.tar"))
}
