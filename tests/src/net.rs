//! Owns network namespaces: makes them, wires them to one switch, runs code in them.
//! Called by `lab`.
//! Must never touch the machine's own namespace.

use std::{
    fs::File,
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::Stdio,
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::process::tool;

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

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Who::ControlPlane => "control-plane",
            Who::Node => "node",
            Who::Pod => "pod",
            Who::Stranger => "stranger",
            Who::Peer => "peer",
            Who::Excepted => "excepted",
        }
    }

    /// IPv4 address. All labs use the same ones: their namespaces are not connected.
    pub fn v4(self) -> Ipv4Addr {
        match self {
            Who::ControlPlane => Ipv4Addr::new(10, 0, 0, 1),
            Who::Node => Ipv4Addr::new(10, 0, 0, 2),
            Who::Pod => Ipv4Addr::new(10, 244, 1, 2),
            Who::Stranger => Ipv4Addr::new(10, 0, 0, 3),
            Who::Peer => Ipv4Addr::new(10, 0, 8, 5),
            Who::Excepted => Ipv4Addr::new(10, 0, 8, 66),
        }
    }

    /// IPv6 address.
    pub fn v6(self) -> Ipv6Addr {
        match self {
            Who::ControlPlane => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
            Who::Node => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
            Who::Pod => Ipv6Addr::new(0xfd01, 0x244, 1, 0, 0, 0, 0, 2),
            Who::Stranger => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3),
            Who::Peer => Ipv6Addr::new(0xfd00, 8, 0, 0, 0, 0, 0, 5),
            Who::Excepted => Ipv6Addr::new(0xfd00, 8, 0, 0, 0, 0, 0, 0x66),
        }
    }

    /// The address of a family.
    pub fn address(self, v6: bool) -> IpAddr {
        if v6 { self.v6().into() } else { self.v4().into() }
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
        let switch = name(id, "switch");
        for namespace in Who::ALL.iter().map(|who| net.namespace(*who)).chain([switch.clone()]) {
            ip(&["netns", "add", &namespace], "")?;
        }
        ip(
            &["-n", &switch, "-batch", "-"],
            "link add br0 type bridge mcast_snooping 0\nlink set br0 up\nlink set lo up\n",
        )?;
        for who in Who::ALL {
            let namespace = net.namespace(who);
            // No duplicate address detection: an address is usable at once.
            net.run(who, || Ok(std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?))?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"], "")?;
            if who != Who::Pod {
                let port = format!("to-{}", &who.name()[..4.min(who.name().len())]);
                ip(
                    &["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &namespace],
                    "",
                )?;
                ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"], "")?;
                let lines = format!(
                    "address add {}/16 dev eth0\naddress add {}/16 dev eth0 nodad\nlink set eth0 up\n",
                    who.v4(),
                    who.v6()
                );
                ip(&["-n", &namespace, "-batch", "-"], &lines)?;
            }
            if !matches!(who, Who::Pod | Who::Node) {
                let lines = format!(
                    "route add 10.244.1.0/24 via {}\n-6 route add fd01:244:1::/64 via {}\n",
                    Who::Node.v4(),
                    Who::Node.v6()
                );
                for line in lines.lines() {
                    let words: Vec<&str> = ["-n", &namespace].into_iter().chain(line.split(' ')).collect();
                    ip(&words, "")?;
                }
            }
        }
        net.wire_pod()?;
        Ok(net)
    }

    fn wire_pod(&self) -> Result<()> {
        let (node, pod) = (self.namespace(Who::Node), self.namespace(Who::Pod));
        ip(&["-n", &node, "link", "add", "pod0", "type", "veth", "peer", "name", "eth0", "netns", &pod], "")?;
        ip(
            &["-n", &node, "-batch", "-"],
            "address add 10.244.1.1/24 dev pod0\naddress add fd01:244:1::1/64 dev pod0 nodad\nlink set pod0 up\n",
        )?;
        let lines = format!(
            "address add {}/24 dev eth0\naddress add {}/64 dev eth0 nodad\nlink set eth0 up\nroute add default via 10.244.1.1\n",
            Who::Pod.v4(),
            Who::Pod.v6()
        );
        ip(&["-n", &pod, "-batch", "-"], &lines)?;
        ip(&["-n", &pod, "-6", "route", "add", "default", "via", "fd01:244:1::1"], "")?;
        self.run(Who::Node, || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            Ok(std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?)
        })
    }

    /// The name that `ip netns` knows.
    pub fn namespace(&self, who: Who) -> String {
        name(&self.id, who.name())
    }

    /// A descriptor of a namespace.
    pub fn open(&self, who: Who) -> Result<File> {
        open(&self.namespace(who))
    }

    /// An `ip` command in a namespace.
    pub fn ip(&self, who: Who, arguments: &[&str]) -> Result<()> {
        let namespace = self.namespace(who);
        let all: Vec<&str> = ["-n", namespace.as_str()].into_iter().chain(arguments.iter().copied()).collect();
        ip(&all, "")
    }

    /// Runs code in a namespace, on a thread of its own.
    pub fn run<T: Send>(&self, who: Who, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        run(&self.open(who)?, code)
    }

    /// The same where the other ends of everybody's wires are.
    pub fn run_on_switch<T: Send>(&self, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        run(&open(&name(&self.id, "switch"))?, code)
    }
}

fn open(namespace: &str) -> Result<File> {
    let path = PathBuf::from("/run/netns").join(namespace);
    File::open(&path).with_context(|| path.display().to_string())
}

fn run<T: Send>(namespace: &File, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let in_it = || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        code()
    };
    std::thread::scope(|scope| scope.spawn(in_it).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Removes the namespaces of a lab, whatever is there of them.
pub fn remove(id: &str) {
    let of_it = name(id, "");
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if let Some(namespace) = entry.file_name().to_str().filter(|namespace| namespace.starts_with(&of_it)) {
            let _ = ip(&["netns", "delete", namespace], "");
        }
    }
}

/// The name of a namespace of a lab.
pub fn name(id: &str, place: &str) -> String {
    format!("nodeguard-{id}-{place}")
}

/// Runs `ip`.
pub fn ip(arguments: &[&str], input: &str) -> Result<()> {
    let mut child = tool("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("ip (package iproute2)")?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
