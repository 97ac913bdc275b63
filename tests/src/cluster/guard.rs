//! Owns the guard in the cluster: its installation by the files of deploy/, its policies, its status and its log.
//! Called by the checks and the bench of the cluster lab.
//! Must never change more of deploy/ than names and addresses: what is tried is what operators install.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use nodeguard::{kernel::observe::events::Denial, report::status::Status};
use serde_json::Value;

use super::{
    Cluster,
    addresses::{at, filled, socket},
    eventually,
    place::Where,
};
use crate::{
    client::sum,
    process::{target, there, until},
};

/// The name that `cargo xtask image` gives the image.
pub const IMAGE: &str = concat!("localhost/nodeguard:", env!("CARGO_PKG_VERSION"));

/// What selects the guard's pods.
pub const LABEL: &str = "app.kubernetes.io/name=nodeguard";

/// The policy that the operator of this cluster enforces.
pub fn policy() -> String {
    filled(include_str!("files/policy.yaml"))
}

/// The archives that a node imports: what `cargo xtask image` wrote, the two images of the pods, and more of those beside them.
pub fn images(more: &[&str]) -> Result<Vec<PathBuf>> {
    let target = target()?;
    let pods = ["pause.tar", "busybox.tar"].iter().chain(more).map(|file| target.with_file_name("cluster").join(file));
    let images = [target.with_file_name("image").join("nodeguard.tar")].into_iter().chain(pods);
    images.map(|image| there(image, "test cluster")).collect()
}

/// The path of a file of deploy/.
pub fn deployed(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join(file)
}

/// deploy/daemonset.yaml with the names that every operator fills in.
pub fn daemonset() -> Result<String> {
    let mut manifest = std::fs::read_to_string(deployed("daemonset.yaml"))?;
    for (blank, filled) in [("<image>", IMAGE), ("<konnectivity server>", at().control)] {
        ensure!(manifest.contains(blank), "the manifest has no {blank}");
        manifest = manifest.replace(blank, filled);
    }
    Ok(manifest)
}

/// A point in time as logs and status have it.
pub fn time(value: &Value) -> Option<SystemTime> {
    value.as_str()?.parse::<Timestamp>().ok().map(SystemTime::from)
}

impl Cluster {
    /// Installs deploy/daemonset.yaml.
    pub fn install_guard(&self) -> Result<()> {
        self.apply(&daemonset()?)?;
        self.guard_ready()
    }

    /// Waits until the DaemonSet's pods are ready.
    pub fn guard_ready(&self) -> Result<()> {
        self.rolled_out("nodeguard")
            .with_context(|| self.system(&format!("describe pods -l {LABEL}")).run().unwrap_or_default())
    }

    /// Waits until the pods of a DaemonSet are ready.
    pub fn rolled_out(&self, daemonset: &str) -> Result<()> {
        let rollout = self.system(&format!("rollout status daemonset/{daemonset} --timeout=120s"));
        rollout.within(Duration::from_secs(150)).run().map(drop)
    }

    /// The newest lines of the guard's log.
    pub fn log(&self, lines: usize) -> Result<String> {
        self.system(&format!("logs daemonset/nodeguard --tail={lines}")).run()
    }

    /// What `nodeguard status` says inside the pod: through the tunnel, as an operator asks.
    pub fn status(&self) -> Result<Status> {
        self.status_of("daemonset/nodeguard")
    }

    /// The status of the guard in a pod.
    pub fn status_of(&self, pod: &str) -> Result<Status> {
        Ok(serde_json::from_str(&self.system(&format!("exec {pod} -- nodeguard status -o json")).run()?)?)
    }

    /// The number of the ruleset in force.
    pub fn epoch(&self) -> Result<u64> {
        Ok(self.status()?.policy.epoch.into())
    }

    /// Waits until something comes through the tunnel again.
    pub fn tunnel_up(&self) -> Result<()> {
        eventually("the tunnel is up again", || Ok(self.epoch().is_ok()))
    }

    /// Replaces the policy's text in its ConfigMap.
    pub fn set_policy(&self, policy: &str) -> Result<()> {
        let map = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "nodeguard-policy", "namespace": "kube-system"},
            "data": {"policy.yaml": policy},
        });
        self.apply(&map.to_string())
    }

    /// Sets the policy and waits until the guard says that it is in force.
    pub fn enforce(&self, policy: &str) -> Result<()> {
        // Not by the epoch: an edit that means the same to the listeners' guard is no new ruleset.
        let sum = sum(policy.as_bytes());
        self.set_policy(policy)?;
        eventually("the policy is in force", || Ok(self.status()?.policy.digest == sum))
    }

    /// How many packets the rule of a port has denied for a reason.
    pub fn denied(&self, port: u16, reason: &str) -> Result<u64> {
        let rule = if port == 10250 { "kubelet" } else { "web" };
        let counters = self.status()?.counters;
        let of_it = counters
            .iter()
            .filter(|counter| counter.rule == rule && counter.reason == reason && counter.verdict == "Deny");
        Ok(of_it.map(|counter| counter.packets).sum())
    }

    /// Waits until the guard reports a denial that happened since then, not an earlier one.
    pub fn reports(
        &self,
        since: SystemTime,
        source: &str,
        (destination, port): (&str, u16),
        reason: &str,
    ) -> Result<()> {
        // An event's time is calculated from two clocks that are read one after the other, on a busy machine some time apart.
        let since = since - Duration::from_millis(100);
        let mut last = None;
        let reported = until("a report of the denial", Duration::from_secs(10), || {
            let events = self.status()?.last_denies;
            let is_it = |event: &Denial| {
                time(&event.time.as_str().into()).is_some_and(|time| time >= since)
                    && event.source.ip().to_string() == source
                    && event.destination.to_string() == destination
                    && event.port == port
                    && event.reason == reason
            };
            let found = events.iter().any(is_it);
            last = events.into_iter().last();
            Ok(found)
        });
        reported.with_context(|| format!("{source} to {destination}:{port}, {reason}; the last event is {last:?}"))
    }

    /// What the guard does with an attempt: `connected`, or the reason of the denial, which is reported and counted.
    pub fn judged(
        &self,
        source: &str,
        to: (&str, u16),
        reason: &str,
        attempt: impl FnOnce() -> Result<bool>,
    ) -> Result<String> {
        let (since, before) = (SystemTime::now(), self.denied(to.1, reason)?);
        if attempt()? {
            return Ok("connected".to_owned());
        }
        self.reports(since, source, to, reason)?;
        let more = self.denied(to.1, reason)? - before;
        ensure!(more > 0, "the counter did not move");
        Ok(format!("denied, {reason} ({more} packets counted)"))
    }

    /// Whether kubelet's port answers an address of the neighbouring host.
    pub fn kubelet_answers(&self, source: &str) -> Result<bool> {
        self.connects(Where::Neighbour, source, (at().node, 10250))
    }
}

/// Kubelet's port of the first node.
pub fn kubelet() -> Result<std::net::SocketAddr> {
    socket(at().node, 10250)
}
