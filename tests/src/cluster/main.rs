//! A real cluster on this machine with the guard as its DaemonSet, and what operators do in it, line by line.
//!
//! Reading order: `main` (what stands when) -> `place` (namespaces, cgroups, the packet filter) -> `pki`, `control`, `node` (Kubernetes) ->
//! `install` (the files of deploy/, pods to try) -> `table` and `checks` (who, what, by which way, expected, seen).

mod checks;
mod control;
mod install;
mod kubectl;
mod node;
mod pki;
mod place;
mod table;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    control::{Control, Egress},
    install::Cluster,
    kubectl::Kubectl,
    node::Node,
    pki::Pki,
    place::{Place, Where},
    table::Table,
};

/// A run that hangs ends by itself after this; with it end all processes of the cluster.
const BOUND: Duration = Duration::from_secs(45 * 60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["node", name, address, directory, ..] => {
            let images = arguments.get(4..).unwrap_or_default();
            node::inside(name, address, Path::new(directory), images).map(|()| true)
        }
        ["--stay"] => cluster(None, true),
        [] => cluster(None, false),
        [filter] if !filter.starts_with('-') => cluster(Some(filter), false),
        _ => Err(anyhow::anyhow!("usage: nodeguard-cluster [--stay | FILTER]")),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn cluster(filter: Option<&str>, stay: bool) -> Result<bool> {
    if !stay {
        nix::unistd::alarm::set(u32::try_from(BOUND.as_secs())?);
    }
    let started = Instant::now();
    let place = Place::new()?;
    let pki = Pki::new(&place)?;
    let outcome = run(&place, &pki, filter, stay, started);
    if let Err(error) = &outcome {
        keep_logs(&place).with_context(|| format!("{error:#}"))?;
    }
    outcome
}

fn run(place: &Place, pki: &Pki, filter: Option<&str>, stay: bool, started: Instant) -> Result<bool> {
    let mut control = Control::start(place, pki, Egress::Grpc)?;
    say(&format!("control plane after {:.0?}", started.elapsed()))?;
    let mut node = Node::start(place, pki, Where::Node, &install::images()?)?;
    let kubectl = Kubectl::new(place, pki)?;
    let cluster = Cluster { place, kubectl: &kubectl };
    cluster.access()?;
    cluster.node_ready(node::NAME, &mut node)?;
    say(&format!("node ready after {:.0?}\n", started.elapsed()))?;
    let mut table = Table::new(filter)?;
    checks::drop_in::example(&cluster, &mut table)?;
    cluster.install_guard()?;
    cluster.pods()?;
    say(&format!("guard and pods ready after {:.0?}", started.elapsed()))?;

    checks::all(&cluster, &mut control, &mut node, pki, &mut table)?;
    let (expected, other) = table.sum()?;
    if stay {
        wait(place, &mut control, &mut node)?;
    }
    // In the words of `cargo test`, which the task adds up.
    say(&format!("test result: {expected} passed; {other} failed; 0 ignored; finished in {:.0?}", started.elapsed()))?;
    if other > 0 {
        keep_logs(place)?;
    }
    Ok(other == 0 && expected > 0)
}

/// Says what to try and waits for ctrl-c or the end of a part.
fn wait(place: &Place, control: &mut Control, node: &mut Node) -> Result<()> {
    let (directory, kubectl) = (place.directory.display(), control::binary("kubectl")?);
    say("\nThe cluster stays until ctrl-c. In another shell, as root:\n")?;
    say(&format!("  export KUBECONFIG={directory}/pki/admin.kubeconfig"))?;
    say(&format!("  alias k='{} {}'", place.enter(Where::Control), kubectl.display()))?;
    for line in [
        "k get pods -A -o wide",
        "k -n kube-system exec ds/nodeguard -- nodeguard status",
        "k exec web -- date                      # through the tunnel",
        "k get --raw /api/v1/namespaces/default/pods/web:8081/proxy/   # refused: tunnel.dial does not name 8081",
        "k -n kube-system edit configmap nodeguard-policy",
    ] {
        say(&format!("  {line}"))?;
    }
    say(&format!(
        "  {} curl -m 2 -k https://10.0.0.2:10250/healthz   # a neighbour: no answer\n",
        place.enter(Where::Neighbour)
    ))?;
    let (stop, stopped) = std::sync::mpsc::channel();
    std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(tokio::signal::ctrl_c())?;
        Ok(stop.send(())?)
    });
    while stopped.recv_timeout(Duration::from_secs(1)).is_err() {
        control.check()?;
        node.check()?;
    }
    Ok(())
}

/// Copies the logs to where they outlive the cluster.
fn keep_logs(place: &Place) -> Result<()> {
    let kept: PathBuf = lab::lab::target()?.with_file_name("cluster").join("logs");
    std::fs::create_dir_all(&kept)?;
    for part in ["", node::NAME, node::SECOND_NAME] {
        for entry in std::fs::read_dir(place.directory.join(part)).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let name = format!("{part}{}{}", if part.is_empty() { "" } else { "-" }, entry.file_name().display());
                std::fs::copy(entry.path(), kept.join(name))?;
            }
        }
    }
    say(&format!("the logs are in {}", kept.display()))
}

/// A line on standard output.
pub(crate) fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
