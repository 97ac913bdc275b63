//! Owns where a cluster stands on this machine: its directory, its cgroups in every hierarchy, its network namespaces.
//! Called by every other part of the cluster lab.
//! Must never use a cgroup, a namespace or a directory of anybody else, nor leave one behind.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::{prctl::set_pdeathsig, signal::Signal};

use super::addresses::{at, filled};
use crate::{
    net::{self, inside},
    process::{command_in, run},
    sweep,
};

/// A network namespace of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// etcd, kube-apiserver, proxy-server and the controllers.
    Control,
    /// Kubelet, pods, the guard.
    Node,
    /// The same for the second node.
    Second,
    /// Another host.
    Neighbour,
}

impl Where {
    const ALL: [Where; 4] = [Where::Control, Where::Node, Where::Second, Where::Neighbour];

    /// The name, and the addresses.
    fn facts(self) -> (&'static str, Vec<&'static str>) {
        match self {
            Where::Control => ("control", vec![at().control, at().control_direct]),
            Where::Node => ("node", vec![at().node]),
            Where::Second => ("second", vec![at().second]),
            Where::Neighbour => ("neighbour", vec![at().neighbour, at().scraper]),
        }
    }

    fn name(self) -> &'static str {
        self.facts().0
    }
}

/// What the cluster has of this machine. All of it is removed when this is dropped.
pub struct Place {
    /// By which everything of it is named.
    pub id: String,
    /// Files: certificates, logs, what etcd, containerd and kubelet keep.
    pub directory: PathBuf,
}

impl Place {
    /// Makes everything, after removing what killed runs left.
    pub fn new() -> Result<Place> {
        ensure!(nix::unistd::geteuid().is_root(), "the cluster needs root");
        sweep::stale();
        let id = format!("{}-cluster", sweep::own_name()?);
        let place = Place { directory: Path::new(sweep::LABS).join(&id), id };
        fs::create_dir_all(&place.directory)?;
        for hierarchy in sweep::hierarchies() {
            for part in ["", "control", "node", "second"] {
                let cgroup = sweep::cgroup(&hierarchy, &place.id).join(part);
                fs::create_dir_all(&cgroup).with_context(|| cgroup.display().to_string())?;
                // A new cpuset is empty, and nothing can live in an empty one.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if let (Ok(all), true) = (fs::read_to_string(hierarchy.join(file)), cgroup.join(file).is_file()) {
                        fs::write(cgroup.join(file), all.trim())?;
                    }
                }
            }
        }
        place.wire()?;
        Ok(place)
    }

    fn wire(&self) -> Result<()> {
        net::wire(&self.id, Where::ALL.into_iter().map(Where::name))?;
        for place in Where::ALL {
            self.ip(place, &addresses(place))?;
            self.ip(place, &routes(place))?;
        }
        for node in [Where::Node, Where::Second] {
            self.run(node, || Ok(fs::write(Path::new("/proc/sys/net").join(at().forwarding), "1")?))?;
            self.nft(node, "-f -", &filled(include_str!("files/node.nft")))?;
        }
        self.nft(Where::Control, "-f -", &filled(include_str!("files/control-plane.nft"))).map(drop)
    }

    /// Runs commands of `ip` in a namespace.
    fn ip(&self, place: Where, lines: &str) -> Result<()> {
        let family = if at().v6() { "-6" } else { "-4" };
        net::ip(&[family, "-n", &self.namespace(place), "-batch", "-"], lines)
    }

    /// How many packets of new connections of the control plane were dropped.
    pub fn refused_by_filter(&self) -> Result<u64> {
        let said = self.nft(Where::Control, "list counter inet lab refused", "")?;
        let packets = said.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
        packets.and_then(|packets| packets.parse().ok()).with_context(|| format!("nft said {said}"))
    }

    /// Lets the control plane's connections to a port out, past the tunnel.
    pub fn let_out(&self, port: u16) -> Result<()> {
        self.nft(Where::Control, &format!("insert rule inet lab out tcp dport {port} accept"), "").map(drop)
    }

    fn nft(&self, place: Where, words: &str, input: &str) -> Result<String> {
        let mut nft = self.command(Path::new("/usr/sbin/nft"), place)?;
        nft.args(words.split(' '));
        run(nft, input)
    }

    fn namespace(&self, place: Where) -> String {
        net::name(&self.id, place.name())
    }

    /// How to enter a network namespace by hand.
    pub fn enter(&self, place: Where) -> String {
        format!("nsenter --net=/run/netns/{}", self.namespace(place))
    }

    /// A cgroup of the cluster, below the root of its hierarchy: a node's own, or the one of everything else.
    pub fn cgroup(&self, place: Where) -> PathBuf {
        let part = match place {
            Where::Node | Where::Second => place.name(),
            Where::Control | Where::Neighbour => Where::Control.name(),
        };
        sweep::cgroup(Path::new(""), &self.id).join(part)
    }

    /// The directory below /proc of a process in a node's cgroup that is the wanted one by its cgroups, its program and its command line.
    pub fn process(&self, node: Where, is_it: impl Fn(&str, &Path, &[&str]) -> bool) -> Result<PathBuf> {
        let own = self.cgroup(node).display().to_string();
        for entry in fs::read_dir("/proc")?.flatten() {
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            let (cgroups, words) = (read("cgroup"), read("cmdline"));
            let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
            if cgroups.contains(&own) && is_it(&cgroups, &program, &words.split('\0').collect::<Vec<_>>()) {
                return Ok(entry.path());
            }
        }
        bail!("the node has no such process")
    }

    /// A descriptor of a network namespace.
    pub fn open(&self, place: Where) -> Result<File> {
        net::open(&self.id, place.name())
    }

    /// A command in a namespace: the node's in the node's cgroups, the others' in one that is not guarded. It ends with this process.
    pub fn command(&self, program: &Path, place: Where) -> Result<Command> {
        let own = self.cgroup(place);
        let cgroups: Vec<PathBuf> = sweep::hierarchies().into_iter().map(|root| root.join(&own)).collect();
        let mut command = command_in(program, self.open(place)?, &cgroups)?;
        // SAFETY: between fork and exec only a system call is made.
        unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
        Ok(command)
    }

    /// Runs code in a network namespace, on a thread of its own.
    pub fn run<T: Send>(&self, place: Where, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.open(place)?, code)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        sweep::remove(&self.id);
    }
}

/// The commands that give a host its addresses.
fn addresses(place: Where) -> String {
    let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
    for (number, address) in place.facts().1.into_iter().enumerate() {
        // An address is usable at once, without asking whether another host has it.
        let nodad = if at().v6() { " nodad" } else { "" };
        // An address that is not the host's first is used only by whoever asks for it.
        let asked = if at().v6() && number > 0 { " preferred_lft 0" } else { "" };
        lines += &format!("address add {address}/{} dev eth0{nodad}{asked}\n", at().prefix);
    }
    lines
}

/// The commands that give a host its routes.
fn routes(place: Where) -> String {
    let [pods, pods_of_second] = at().pods_of;
    let mut lines = String::new();
    for (owner, pods, node) in [(Where::Node, pods, at().node), (Where::Second, pods_of_second, at().second)] {
        if place != owner {
            // From the control plane only for what tries it directly.
            let table = if place == Where::Control { " table 9" } else { "" };
            lines += &format!("route add {pods} via {node}{table}\n");
        } else {
            // Without a default route kubelet guesses no address.
            lines += &format!("route add {} via {}\n", at().everything, at().control);
        }
    }
    if place == Where::Control {
        lines += &format!("rule add from {} table 9\n", at().control_direct);
    }
    lines
}
