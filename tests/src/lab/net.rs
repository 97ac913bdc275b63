//! Owns network namespaces: makes them, wires them to one switch, runs code in them; and the small one with nothing but loopback.
//! Called by the labs, and by tests and benches that need a namespace of their own.
//! Must never touch the machine's own namespace, nor resolve a name outside: the resolver of an isolated thread reads files only.

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use tempfile::NamedTempFile;

use crate::process::run_tool;

/// Somebody with a place in the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Where the proxy-server runs.
    ControlPlane,
    /// Where the guard and the kubelet stand-in run.
    Node,
    /// Behind the node.
    Pod,
    /// Whom no rule names.
    Stranger,
    /// Inside an allowed CIDR.
    Peer,
    /// Inside its exception.
    Excepted,
}

impl Who {
    /// Everybody.
    pub const ALL: [Who; 6] = [Who::ControlPlane, Who::Node, Who::Pod, Who::Stranger, Who::Peer, Who::Excepted];

    /// The name, and the addresses. All labs use the same ones: their namespaces are not connected.
    fn facts(self) -> (&'static str, [u8; 4], [u16; 8]) {
        match self {
            Who::ControlPlane => ("control-plane", [10, 0, 0, 1], [0xfd00, 0, 0, 0, 0, 0, 0, 1]),
            Who::Node => ("node", [10, 0, 0, 2], [0xfd00, 0, 0, 0, 0, 0, 0, 2]),
            Who::Pod => ("pod", [10, 244, 1, 2], [0xfd01, 0x244, 1, 0, 0, 0, 0, 2]),
            Who::Stranger => ("stranger", [10, 0, 0, 3], [0xfd00, 0, 0, 0, 0, 0, 0, 3]),
            Who::Peer => ("peer", [10, 0, 8, 5], [0xfd00, 8, 0, 0, 0, 0, 0, 5]),
            Who::Excepted => ("excepted", [10, 0, 8, 66], [0xfd00, 8, 0, 0, 0, 0, 0, 0x66]),
        }
    }

    /// In words.
    pub fn name(self) -> &'static str {
        self.facts().0
    }

    /// The IPv4 address.
    pub fn v4(self) -> Ipv4Addr {
        self.facts().1.into()
    }

    /// The IPv6 address.
    pub fn v6(self) -> Ipv6Addr {
        self.facts().2.into()
    }

    /// The address of a family.
    pub fn address(self, v6: bool) -> IpAddr {
        if v6 { self.v6().into() } else { self.v4().into() }
    }

    /// A port at the address of a family.
    pub fn at(self, v6: bool, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(v6), port)
    }
}

/// The namespaces of one lab.
pub struct Net {
    id: String,
}

impl Net {
    /// Makes the namespaces and wires them: everybody on one switch, the pod behind the node.
    pub fn new(id: &str) -> Result<Net> {
        let net = Net { id: id.to_owned() };
        let on_switch = Who::ALL.into_iter().filter(|who| *who != Who::Pod);
        wire(id, on_switch.clone().map(Who::name))?;
        let pod = namespace(id, Who::Pod.name())?;
        let (node, v6) = (Who::Node.v4(), Who::Node.v6());
        let to_pods = format!("route add 10.244.1.0/24 via {node}\nroute add fd01:244:1::/64 via {v6}\n");
        for who in on_switch {
            net.addresses(who, "eth0", [&format!("{}/16", who.v4()), &format!("{}/16", who.v6())])?;
            if who != Who::Node {
                net.batch(who, &to_pods)?;
            }
        }
        net.batch(Who::Node, &format!("link add pod0 type veth peer name eth0 netns {pod}\n"))?;
        net.addresses(Who::Node, "pod0", ["10.244.1.1/24", "fd01:244:1::1/64"])?;
        net.addresses(Who::Pod, "eth0", [&format!("{}/24", Who::Pod.v4()), &format!("{}/64", Who::Pod.v6())])?;
        net.batch(Who::Pod, "route add default via 10.244.1.1\nroute add default via fd01:244:1::1\n")?;
        net.run(Who::Node, || {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            Ok(fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?)
        })?;
        Ok(net)
    }

    /// Gives an interface an address of each family.
    fn addresses(&self, who: Who, interface: &str, [v4, v6]: [&str; 2]) -> Result<()> {
        self.batch(
            who,
            &format!(
                "link set lo up\naddress add {v4} dev {interface}\naddress add {v6} dev {interface} nodad\nlink set {interface} up\n"
            ),
        )
    }

    fn batch(&self, who: Who, lines: &str) -> Result<()> {
        ip(&["-n", &self.namespace(who), "-batch", "-"], lines)
    }

    /// The name that `ip netns` knows.
    pub fn namespace(&self, who: Who) -> String {
        name(&self.id, who.name())
    }

    /// A descriptor of a namespace.
    pub fn open(&self, who: Who) -> Result<File> {
        open(&self.id, who.name())
    }

    /// Runs `ip` in a namespace.
    pub fn ip(&self, who: Who, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.namespace(who)], arguments].concat(), "")
    }

    /// Runs code in a namespace, on a thread of its own.
    pub fn run<T: Send>(&self, who: Who, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.open(who)?, code)
    }

    /// The same in the switch's namespace.
    pub fn run_on_switch<T: Send>(&self, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&open(&self.id, SWITCH)?, code)
    }
}

/// The place where the other ends of everybody's wires are.
pub const SWITCH: &str = "switch";

/// Makes a namespace for each of these places of a lab, with `eth0` on one switch.
pub fn wire(id: &str, places: impl Iterator<Item = &'static str>) -> Result<()> {
    let switch = namespace(id, SWITCH)?;
    let mut wires = "link set lo up\nlink add br0 type bridge mcast_snooping 0\nlink set br0 up\n".to_owned();
    for place in places {
        let (port, namespace) = (port(place), namespace(id, place)?);
        wires += &format!("link add {port} type veth peer name eth0 netns {namespace}\n");
        wires += &format!("link set {port} master br0 up\n");
    }
    ip(&["-n", &switch, "-batch", "-"], &wires)
}

/// The name of the switch's port that leads to a place.
pub fn port(place: &str) -> String {
    format!("to-{}", place.get(..4).unwrap_or(place))
}

/// Makes a namespace of a lab; its name.
fn namespace(id: &str, place: &str) -> Result<String> {
    let namespace = name(id, place);
    ip(&["netns", "add", &namespace], "")?;
    // No duplicate address detection: an address is usable at once.
    inside(&open(id, place)?, || Ok(fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?))?;
    Ok(namespace)
}

/// A descriptor of the namespace of a place of a lab.
pub fn open(id: &str, place: &str) -> Result<File> {
    let path = PathBuf::from("/run/netns").join(name(id, place));
    File::open(&path).with_context(|| path.display().to_string())
}

/// Runs code in a network namespace, on a thread of its own. Threads that the code starts are in the same namespace.
pub fn inside<T: Send>(namespace: &File, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_a_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        code()
    })
}

/// Runs code on a thread of its own: what it changes of its surroundings ends with it.
pub fn on_a_thread<T: Send>(code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(code).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Removes the namespaces of a lab, whatever is there of them.
pub fn remove(id: &str) {
    let of_it = name(id, "");
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if let Some(namespace) = entry.file_name().to_str().filter(|namespace| namespace.starts_with(&of_it)) {
            let _ = ip(&["netns", "delete", namespace], "");
        }
    }
}

/// The name of a namespace of a lab.
pub fn name(id: &str, place: &str) -> String {
    format!("nodeguard-{id}-{place}")
}

/// Runs `ip` with this input.
pub fn ip(arguments: &[&str], input: &str) -> Result<()> {
    run_tool("ip", arguments, input).context("ip (package iproute2)").map(drop)
}

/// Runs code on a thread of its own, in namespaces of its own (network, mounts); loopback also has these addresses.
pub fn isolated<T: Send>(addresses: &[&str], code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    ensure!(nix::unistd::geteuid().is_root(), "a network namespace of its own needs root");
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
        own_mounts()?;
        if Path::new("/etc/nsswitch.conf").is_file() {
            replace("/etc/nsswitch.conf", "hosts: files\n")?;
        }
        // All agents dial one endpoint: the ports of connections that ended a moment ago are needed again.
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 65000")?;
        fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")?;
        // IPv4 by local routes: no interface has these addresses, so an agent does not take them for its node's own. IPv6 cannot be bound so.
        let added = addresses.iter().map(|address| {
            if address.contains(':') {
                format!("address add {address}/128 dev lo\n")
            } else {
                format!("route add local {address}/32 dev lo\n")
            }
        });
        ip(&["-batch", "-"], &("link set lo up\n".to_owned() + &added.collect::<String>()))?;
        code()
    })
}

/// Inside [`isolated`]: from now on names are what this file says.
pub fn hosts(text: &str) -> Result<NamedTempFile> {
    replace("/etc/hosts", text)
}

/// Puts a file with this text over another one; the mount keeps it when the returned name is gone.
fn replace(path: &str, text: &str) -> Result<NamedTempFile> {
    let file = NamedTempFile::new()?;
    fs::write(file.path(), text)?;
    mount(Some(file.path()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mount over {path}"))?;
    Ok(file)
}

fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("a mount namespace")
}

/// Inside [`isolated`]: sets a congestion control without pacing and returns its name. The timers of BBR cost an agent a third of its work in
/// a virtual machine. CUBIC is used if a namespace may have it, otherwise Reno.
pub fn without_pacing() -> Result<String> {
    let control = Path::new("/proc/sys/net/ipv4/tcp_congestion_control");
    let may_be = ["cubic", "reno"].into_iter().find(|name| fs::write(control, name).is_ok());
    may_be.map(str::to_owned).with_context(|| format!("neither CUBIC nor Reno can be set: {}", control.display()))
}

/// Runs code with the sysfs of the calling thread's network namespace, which no mount of the machine shows.
pub fn with_sysfs<T: Send>(code: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    on_a_thread(|| {
        own_mounts()?;
        let directory = tempfile::tempdir()?;
        mount(Some("sysfs"), directory.path(), Some("sysfs"), MsFlags::empty(), None::<&str>)
            .context("mount -t sysfs")?;
        let result = code(directory.path());
        umount2(directory.path(), MntFlags::MNT_DETACH)?;
        result
    })
}
