//! Owns a real cluster on this machine with the guard as its DaemonSet, and what is asked of it.
//! Called by `nodeguard-cluster`: its checks (`tests/cluster`) and its bench.
//! Must never use anything of the machine that is not the cluster's own, nor leave anything behind.
//!
//! Reading order: `addresses`, `place` (namespaces, cgroups, the packet filter) -> `pki`, `control`, `node` (Kubernetes) -> `kubectl`, `guard`
//! (the files of deploy/, policies, the guard's status and log) -> `bench` (what the guard costs).

mod addresses;
mod bench;
mod control;
mod guard;
mod kubectl;
mod node;
mod pki;
mod place;

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result};

use self::addresses::socket;
pub use self::{
    addresses::{Addresses, at, choose as choose_family, filled},
    bench::{bench, converse, serve},
    control::{Control, Egress, Front, binary, choose as choose_programs},
    guard::{IMAGE, LABEL, daemonset, deployed, images, kubelet, policy, time},
    kubectl::{Call, Reading, Stream},
    node::{NAME, Node, SECOND_NAME, inside as run_node},
    pki::{Pki, text},
    place::{Place, Where},
};
use crate::process::{target, until};
pub use crate::{
    bench::print_line as say,
    client::sum,
    process::{Said, finish},
    table::Table,
};

/// How long a program may take to start, and a change to take effect, on a machine that others use too.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A cluster that answers. Its parts end in this order.
pub struct Cluster {
    /// The first node.
    pub node: Node,
    /// The control plane.
    pub control: Control,
    /// Its certificates.
    pub pki: Arc<Pki>,
    /// Where it stands.
    pub place: Arc<Place>,
}

impl Cluster {
    /// Starts a control plane and a node, and waits until the node takes pods. The node has the images of [`images`], and these.
    pub fn start(place: &Arc<Place>, images: &[&str]) -> Result<Cluster> {
        let pki = Arc::new(Pki::new(place)?);
        let control = Control::start(place, &pki, Front::own(Egress::Grpc))?;
        let node = Node::start(place, &pki, Where::Node, &guard::images(images)?)?;
        let mut cluster = Cluster { node, control, pki, place: Arc::clone(place) };
        cluster.apply(include_str!("files/access.yaml"))?;
        cluster.node_ready(node::NAME)?;
        cluster.check()?;
        Ok(cluster)
    }

    /// A call of kubectl, its words separated by spaces.
    pub fn kubectl(&self, words: &str) -> Call<'_> {
        Call::new(&self.place, words)
    }

    /// The same in the namespace kube-system.
    pub fn system(&self, words: &str) -> Call<'_> {
        Call::new(&self.place, &format!("-n kube-system {words}"))
    }

    /// Applies a manifest.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        self.kubectl("apply -f -").input(manifest).run().with_context(|| manifest.to_owned()).map(drop)
    }

    /// Waits until a node takes pods.
    pub fn node_ready(&self, name: &str) -> Result<()> {
        let ready = format!(r#"get node {name} -o jsonpath={{.status.conditions[?(@.type=="Ready")].status}}"#);
        eventually("the node is ready", || Ok(self.kubectl(&ready).run().is_ok_and(|said| said == "True")))
    }

    /// Applies the manifest of one pod and waits until the pod is ready.
    pub fn pod(&self, name: &str, manifest: &str) -> Result<()> {
        self.apply(manifest)?;
        self.kubectl(&format!("wait --for=condition=Ready pod/{name} --timeout=50s")).run().map(drop)
    }

    /// Applies the manifest of the first pods and waits until all are ready.
    pub fn pods(&self, manifest: &str) -> Result<()> {
        // The controller creates the account; pods are refused before.
        let account = "get serviceaccount default";
        eventually("the default service account", || Ok(self.kubectl(account).run().is_ok()))?;
        self.apply(manifest)?;
        let ready = self.kubectl("wait --for=condition=Ready pod --all --timeout=120s").within(PATIENCE * 2).run();
        ready.with_context(|| self.kubectl("describe pods").run().unwrap_or_default()).map(drop)
    }

    /// A pod's address.
    pub fn address(&self, pod: &str) -> Result<String> {
        let address = self.kubectl(&format!("get pod {pod} -o jsonpath={{.status.podIP}}")).run()?;
        anyhow::ensure!(!address.is_empty(), "{pod} has no address");
        Ok(address)
    }

    /// Whether a TCP connection opens from an address of a namespace; false if nobody answers.
    pub fn connects(&self, from: Where, source: &str, (host, port): (&str, u16)) -> Result<bool> {
        // On this machine a SYN-ACK takes milliseconds, however busy it is.
        const SYN_ACK: Duration = Duration::from_secs(2);
        let (source, to) = (socket(source, 0)?, socket(host, port)?);
        self.place.run(from, || {
            let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
            socket.bind(&source.into())?;
            match socket.connect_timeout(&to.into(), SYN_ACK) {
                Ok(()) => Ok(true),
                Err(error) if crate::client::timed_out(&error) => Ok(false),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Fails if a part has ended.
    pub fn check(&mut self) -> Result<()> {
        self.control.check()?;
        self.node.process.check()
    }
}

/// Polls the cluster until a condition holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, PATIENCE, || {
        let held = holds()?;
        if !held {
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(held)
    })
}

/// Copies the logs to where they outlive the cluster.
pub fn keep_logs(place: &Place) -> Result<()> {
    let kept = target()?.with_file_name("cluster").join("logs");
    fs::create_dir_all(&kept)?;
    for part in ["", node::NAME, node::SECOND_NAME] {
        for entry in fs::read_dir(place.directory.join(part)).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let name = Path::new(part).join(entry.file_name()).display().to_string().replace('/', "-");
                fs::copy(entry.path(), kept.join(name))?;
            }
        }
    }
    say(&format!("the logs are in {}", kept.display()))
}
