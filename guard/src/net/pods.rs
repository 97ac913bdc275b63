//! Owns the addresses of the pods on this node: from their network namespaces, and from the node's own routes.
//! Called by `tunnel/advertise`, every few seconds.
//! Must never take the address of another node's pod for one of this node's: the server would send its dials here.
//!
//! Two sources, merged. `/proc/PID/net` shows the addresses of the network namespace of each visible process: that is right with any CNI,
//! and needs the host's process ids (`hostPID`). A route of this node to a single address without a gateway leads to a pod here
//! (Calico, Cilium with endpoint routes, the AWS and GKE CNIs, kindnet); bridges (flannel and others) have no such routes.

use std::{
    collections::{BTreeSet, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt,
    path::Path,
};

/// The addresses of all pods and of anything else that has a network namespace here. The caller knows which prefixes belong to pods.
pub fn addresses(proc: &Path) -> io::Result<BTreeSet<IpAddr>> {
    let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let mut all = BTreeSet::new();
    let own = proc.join("self/net");
    all.extend(routes_v4(&text(&own.join("route"))));
    all.extend(routes_v6(&text(&own.join("ipv6_route"))));
    let mut seen: HashSet<u64> = inode(&own).into_iter().collect();
    for entry in fs::read_dir(proc)? {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            continue;
        }
        let net = entry.path().join("net");
        if inode(&net).is_some_and(|inode| seen.insert(inode)) {
            all.extend(local_addresses(&net));
        }
    }
    Ok(all)
}

/// What tells the network namespaces behind two `/proc/PID/net` apart: each namespace has its own inode for this file, and reading the inode
/// needs no permission on the process.
pub(crate) fn inode(net: &Path) -> Option<u64> {
    fs::metadata(net.join("dev")).ok().map(|about| about.ino())
}

/// The addresses of the network namespace behind a `/proc/PID/net`, without tentative ones.
pub(crate) fn local_addresses(net: &Path) -> BTreeSet<IpAddr> {
    let text = |file: &str| fs::read_to_string(net.join(file)).unwrap_or_default();
    local_v4(&text("fib_trie")).into_iter().chain(local_v6(&text("if_inet6"))).collect()
}

/// The local addresses in `fib_trie`: `|-- ADDRESS`, then `/32 host LOCAL`.
fn local_v4(text: &str) -> Vec<IpAddr> {
    let (mut leaf, mut found) = (None, Vec::new());
    for line in text.lines() {
        let line = line.trim_start();
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.trim_end().parse::<Ipv4Addr>().ok();
        } else if line.trim_end() == "/32 host LOCAL" {
            found.extend(leaf.map(IpAddr::from));
        }
    }
    found
}

/// The addresses in `if_inet6`: address, index, length, scope, flags (all hexadecimal), name.
fn local_v6(text: &str) -> Vec<IpAddr> {
    const TENTATIVE: u32 = 0x40;
    let address = |line: &str| {
        let mut fields = line.split_whitespace();
        let (address, flags) = (fields.next()?, fields.nth(3)?);
        let flags = u32::from_str_radix(flags, 16).ok()?;
        (flags & TENTATIVE == 0).then(|| hex_v6(address)).flatten()
    };
    text.lines().filter_map(address).collect()
}

/// The routes to a single address without a gateway in `route`: name, destination, gateway, flags, ..., mask.
fn routes_v4(text: &str) -> Vec<IpAddr> {
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [name, destination, gateway, _, _, _, _, mask, ..] = fields[..] else { return None };
        // Each number is an address in the byte order of this machine.
        let number = |text: &str| u32::from_str_radix(text, 16).ok();
        let one = number(mask)? == u32::MAX && number(gateway)? == 0 && name != "lo";
        one.then_some(IpAddr::from(number(destination)?.to_ne_bytes()))
    };
    text.lines().filter_map(route).collect()
}

/// The same in `ipv6_route`: destination, length, source, length, next hop, metric, counts, flags, name.
fn routes_v6(text: &str) -> Vec<IpAddr> {
    const LOCAL_OR_REJECT: u32 = 0x8000_0200;
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [destination, length, _, _, next, _, _, _, flags, name] = fields[..] else { return None };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let one = length == "80" && hex_v6(next)? == Ipv6Addr::UNSPECIFIED && name != "lo";
        (one && flags & LOCAL_OR_REJECT == 0).then(|| hex_v6(destination)).flatten()
    };
    text.lines().filter_map(route).collect()
}

fn hex_v6(text: &str) -> Option<IpAddr> {
    (text.len() == 32)
        .then(|| u128::from_str_radix(text, 16).ok())
        .flatten()
        .map(|bits| Ipv6Addr::from_bits(bits).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_kernels_tables_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.244.1.0\n        /24 link UNICAST\nLocal:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.244.1.2\n        /32 host LOCAL\n     |-- 10.244.1.255\n        /32 link BROADCAST\n        |-- 127.0.0.1\n           /32 host LOCAL\n";
        assert_eq!(local_v4(trie), ips(&["10.244.1.2", "127.0.0.1"]));
        let inet6 = "fd010244000100000000000000000002 02 40 00 80 eth0\nfe800000000000000000000000000001 02 40 20 80 eth0\nfd010244000100000000000000000003 02 40 00 c0 eth0\n";
        assert_eq!(local_v6(inet6), ips(&["fd01:244:1::2", "fe80::1"]));
        // A route to 10.244.1.7 on cali1; one through a gateway; a network; loopback.
        let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\ncali1\t0701F40A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\neth0\t0802F40A\t0100000A\t0007\t0\t0\t0\tFFFFFFFF\t0\t0\t0\neth0\t0000000A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\nlo\t0100007F\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n";
        assert_eq!(routes_v4(routes), ips(&["10.244.1.7"]));
        let zero = "00000000000000000000000000000000";
        let line = |to: &str, length: &str, next: &str, flags: &str, name: &str| {
            format!("{to} {length} {zero} 00 {next} 00000400 00000001 00000000 {flags} {name}\n")
        };
        let pod = "fd010244000100000000000000000007";
        let routes = [
            line(pod, "80", zero, "00000001", "cali1"),
            line("fd010244000100000000000000000008", "80", "fe800000000000000000000000000001", "00000003", "eth0"),
            line("fd010244000100000000000000000009", "80", zero, "80200001", "cali1"),
            line(pod, "40", zero, "00000001", "eth0"),
        ];
        assert_eq!(routes_v6(&routes.concat()), ips(&["fd01:244:1::7"]));
    }

    #[test]
    fn this_machine_is_read() {
        assert!(addresses(Path::new("/proc")).is_ok());
        assert!(addresses(Path::new("/nowhere")).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[0-9a-f|/\\- \nA-Z]{0,300}") {
            let _ = (local_v4(&text), local_v6(&text), routes_v4(&text), routes_v6(&text));
        }
    }
}
