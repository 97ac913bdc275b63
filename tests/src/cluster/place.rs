//! Owns where a cluster stands on this machine: its directory, its cgroups in every hierarchy, its network namespaces.
//! Called by `main`; every other part is given what is here.
//! Must never use a cgroup, a namespace or a directory of anybody else, nor leave one behind.

use std::{
    fs,
    fs::File,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use lab::{
    net::{ip, name},
    process::tool,
    sweep,
};
use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl::set_pdeathsig, signal::Signal},
};

use crate::addresses::{Addresses, at};

/// A network namespace of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// etcd, kube-apiserver, proxy-server and the controllers.
    Control,
    /// Kubelet, pods, the guard.
    Node,
    /// The same again.
    Second,
    /// Another host.
    Neighbour,
}

impl Where {
    const ALL: [Where; 4] = [Where::Control, Where::Node, Where::Second, Where::Neighbour];

    fn name(self) -> &'static str {
        match self {
            Where::Control => "control",
            Where::Node => "node",
            Where::Second => "second",
            Where::Neighbour => "neighbour",
        }
    }

    fn addresses(self) -> Vec<&'static str> {
        match self {
            Where::Control => vec![at().control, at().control_direct],
            Where::Node => vec![at().node],
            Where::Second => vec![at().second],
            Where::Neighbour => vec![at().neighbour, at().scraper],
        }
    }
}

/// What the cluster has of this machine. All of it is gone when this is dropped.
pub(crate) struct Place {
    /// By which everything of it is named.
    pub(crate) id: String,
    /// Files: certificates, logs, what etcd, containerd and kubelet keep.
    pub(crate) directory: PathBuf,
}

/// New connections of the control plane go nowhere: what reaches the node goes through the tunnel, which the node opened.
const FILTER: &str = "table inet lab {
    counter refused { }
    chain out {
        type filter hook output priority 0; policy accept;
        oifname lo accept
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        <family> saddr <direct> accept
        meta l4proto { tcp, udp } counter name refused drop
        drop
    }
}
";

/// Pods reach the control plane under their node's address, as in most clusters.
const MASQUERADE: &str = "table <family> lab {
    chain post { type nat hook postrouting priority 100; <family> saddr <pods> <family> daddr <control> masquerade; }
}
";

/// A packet filter's text with the cluster's addresses.
fn filled(text: &str) -> String {
    let Addresses { family, control_direct, pods, control, .. } = at();
    text.replace("<family>", family)
        .replace("<direct>", control_direct)
        .replace("<pods>", pods)
        .replace("<control>", control)
}

impl Place {
    /// Makes everything, after removing what killed runs left.
    pub(crate) fn new() -> Result<Place> {
        ensure!(nix::unistd::geteuid().is_root(), "the cluster needs root");
        sweep::stale();
        let pid = std::process::id();
        let id = format!("{pid}-{}-cluster", sweep::start_time(pid).context("/proc/self/stat")?);
        let place = Place { directory: Path::new(sweep::LABS).join(&id), id };
        fs::create_dir_all(&place.directory)?;
        for hierarchy in sweep::hierarchies() {
            let own = hierarchy.join(format!("nodeguard-lab-{}", place.id));
            for part in ["", "control", "node", "second"] {
                let cgroup = own.join(part);
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
        let switch = name(&self.id, "switch");
        // An address is usable at once, without asking whether another has it.
        let nodad = if at().family == "ip6" { " nodad" } else { "" };
        ip(&["netns", "add", &switch], "")?;
        ip(&["-n", &switch, "-batch", "-"], "link add br0 type bridge mcast_snooping 0\nlink set br0 up\n")?;
        for place in Where::ALL {
            let namespace = self.namespace(place);
            ip(&["netns", "add", &namespace], "")?;
            let port = format!("to-{}", place.name());
            ip(
                &["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &namespace],
                "",
            )?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"], "")?;
            let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
            for address in place.addresses() {
                // One that is not the host's first is used by whoever asks for it alone.
                let other = at().family == "ip6" && Some(&address) != place.addresses().first();
                let asked = if other { " preferred_lft 0" } else { "" };
                lines.push_str(&format!("address add {address}/{} dev eth0{nodad}{asked}\n", at().prefix));
            }
            self.run(place, || Ok(fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?))?;
            ip(&["-n", &namespace, "-batch", "-"], &lines)?;
        }
        let [pods, pods_of_second] = at().pods_of;
        for (owner, pods, node) in [(Where::Node, pods, at().node), (Where::Second, pods_of_second, at().second)] {
            let to_pods = ["route", "add", pods, "via", node];
            for place in [Where::Node, Where::Second, Where::Neighbour] {
                if place != owner {
                    ip(&[&["-n", &self.namespace(place)][..], &to_pods].concat(), "")?;
                }
            }
            // From the control plane only for what tries it directly.
            ip(&[&["-n", &self.namespace(Where::Control)][..], &to_pods, &["table", "9"]].concat(), "")?;
        }
        let family = if at().family == "ip6" { "-6" } else { "-4" };
        let rule = ["rule", "add", "from", at().control_direct, "table", "9"];
        ip(&[&["-n", &self.namespace(Where::Control), family][..], &rule].concat(), "")?;
        for node in [Where::Node, Where::Second] {
            // Without a default route kubelet guesses no address.
            ip(&["-n", &self.namespace(node), "route", "add", at().everything, "via", at().control], "")?;
            self.run(node, || Ok(fs::write(Path::new("/proc/sys/net").join(at().forwarding), "1")?))?;
            self.nft(node, &["-f", "-"], &filled(MASQUERADE))?;
        }
        self.nft(Where::Control, &["-f", "-"], &filled(FILTER)).map(drop)
    }

    /// How many packets of new connections of the control plane were dropped.
    pub(crate) fn refused_by_filter(&self) -> Result<u64> {
        let said = self.nft(Where::Control, &["list", "counter", "inet", "lab", "refused"], "")?;
        let packets = said.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
        packets.and_then(|packets| packets.parse().ok()).with_context(|| format!("nft said {said}"))
    }

    /// Lets the control plane's connections to a port out, past the tunnel.
    pub(crate) fn let_out(&self, port: u16) -> Result<()> {
        let port = port.to_string();
        self.nft(Where::Control, &["insert", "rule", "inet", "lab", "out", "tcp", "dport", &port, "accept"], "")
            .map(drop)
    }

    fn nft(&self, place: Where, arguments: &[&str], input: &str) -> Result<String> {
        let mut nft = self.command(Path::new("/usr/sbin/nft"), place)?;
        let mut child =
            nft.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    fn namespace(&self, place: Where) -> String {
        name(&self.id, place.name())
    }

    /// How to enter a network namespace by hand.
    pub(crate) fn enter(&self, place: Where) -> String {
        format!("nsenter --net=/run/netns/{}", self.namespace(place))
    }

    /// A cgroup that is no node's, below the root of its hierarchy.
    pub(crate) fn cgroup_beside(&self) -> String {
        format!("nodeguard-lab-{}/control", self.id)
    }

    /// What the path of each cgroup of a node holds.
    pub(crate) fn cgroup_name(&self, node: Where) -> String {
        format!("nodeguard-lab-{}/{}", self.id, node.name())
    }

    /// A descriptor of a network namespace.
    pub(crate) fn open(&self, place: Where) -> Result<File> {
        let path = PathBuf::from("/run/netns").join(self.namespace(place));
        File::open(&path).with_context(|| path.display().to_string())
    }

    /// A command in a namespace: the node's in the node's cgroups, the others' in one that is not guarded. It ends with this process.
    pub(crate) fn command(&self, program: &Path, place: Where) -> Result<Command> {
        let part = match place {
            Where::Node | Where::Second => place.name(),
            Where::Control | Where::Neighbour => "control",
        };
        let below = format!("nodeguard-lab-{}/{part}/cgroup.procs", self.id);
        let open = |path: PathBuf| File::options().write(true).open(&path).with_context(|| path.display().to_string());
        let cgroups: Vec<File> =
            sweep::hierarchies().into_iter().map(|root| open(root.join(&below))).collect::<Result<_>>()?;
        let namespace = self.open(place)?;
        let mut command = tool(program);
        command.stdin(Stdio::null());
        let enter = move || {
            set_pdeathsig(Signal::SIGKILL)?;
            cgroups.iter().try_for_each(|mut cgroup| cgroup.write_all(b"0"))?;
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
        };
        // SAFETY: between fork and exec only system calls are made, on descriptors opened before.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// Runs code in a network namespace, on a thread of its own.
    pub(crate) fn run<T: Send>(&self, place: Where, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = self.open(place)?;
        let in_it = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            code()
        };
        std::thread::scope(|scope| scope.spawn(in_it).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        sweep::remove(&self.id);
    }
}
