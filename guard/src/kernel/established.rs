//! Owns connections that were there before a ruleset: those to guarded ports that it does not admit are cut.
//! Called by `app` after every ruleset that came into force; the programs look at new connections only.
//! Must never touch a connection that the ruleset admits, one that this node or a pod opened, or one outside the guarded cgroup.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::Path,
    time::Duration,
};

use guard_common::{
    Listener, Reason, Scope, Verdict,
    abi::{FlowKey, Pinhole},
    decide,
    packet::{TCP, mapped},
};
use nix::sched::{CloneFlags, setns};

use super::{
    model::Model,
    plan::Image,
    sock_diag::{Diag, TcpSocket},
};

/// What a pass over the sockets did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Network namespaces that were looked into.
    pub namespaces: usize,
    /// Connections to guarded ports.
    pub judged: usize,
    /// Those that were cut, with the reason.
    pub cut: Vec<(TcpSocket, Reason)>,
    /// Those that should have been cut and are still there.
    pub failed: usize,
}

/// How long a denied connection has to stay one before it is cut. One that just ends has lost its other end already, and with it what
/// would admit it.
const CONFIRM: Duration = Duration::from_millis(150);

/// The denied connections of one network namespace.
struct Denied {
    namespace: File,
    connections: Vec<(TcpSocket, Reason)>,
}

/// Judges every connection to a listener in every network namespace that a process lives in, and cuts what the image denies.
pub fn pass(image: &Image, cgroup: &Path) -> io::Result<Pass> {
    let mut model = Model { image: image.clone(), pinholes: BTreeMap::new() };
    let (mut pass, first) = look(&mut model, cgroup)?;
    if first.is_empty() {
        return Ok(pass);
    }
    std::thread::sleep(CONFIRM);
    let candidates: HashSet<[u8; 8]> =
        first.iter().flat_map(|denied| &denied.connections).map(|(socket, _)| socket.cookie()).collect();
    for Denied { namespace, mut connections } in look(&mut model, cgroup)?.1 {
        connections.retain(|(socket, _)| candidates.contains(&socket.cookie()));
        for (done, cut) in in_namespace(&namespace, || Diag::destroy(&connections))?.into_iter().zip(connections) {
            if done { pass.cut.push(cut) } else { pass.failed += 1 }
        }
    }
    Ok(pass)
}

/// One look at all connections: how many were judged, and which are denied.
fn look(model: &mut Model, cgroup: &Path) -> io::Result<(Pass, Vec<Denied>)> {
    let inside = cgroup_ids(cgroup)?;
    let covers_all = super::cgroup::v2_root().is_ok_and(|root| root == cgroup);
    let own = fs::metadata("/proc/self/ns/net")?.ino();
    let dump =
        |(id, namespace): (u64, File)| in_namespace(&namespace, Diag::dump).map(|sockets| (id, namespace, sockets));
    let dumped = namespaces(own)?.into_iter().map(dump).collect::<io::Result<Vec<_>>>()?;
    // The other ends are read after all of these: a connection that was seen above has its opener here, however new it is.
    model.pinholes = pinholes(&Diag::dump()?, &own_inodes()?);
    let mut pass = Pass { namespaces: dumped.len(), ..Pass::default() };
    let mut denied = Vec::new();
    for (id, namespace, sockets) in dumped {
        let listening: BTreeSet<u16> =
            sockets.iter().filter(|socket| socket.listens()).map(|socket| socket.local.port()).collect();
        let scope = if id == own { Scope::Node } else { Scope::Pod };
        let served = sockets.into_iter().filter(|socket| !socket.listens() && listening.contains(&socket.local.port()));
        let guarded =
            served.filter(|socket| covers_all || socket.cgroup.is_some_and(|cgroup| inside.contains(&cgroup)));
        let mut connections = Vec::new();
        for socket in guarded {
            let (verdict, reason) = judge(model, scope, socket.remote, socket.local);
            pass.judged += usize::from(reason != Reason::NotGuarded);
            if verdict == Verdict::Deny {
                connections.push((socket, reason));
            }
        }
        if !connections.is_empty() {
            denied.push(Denied { namespace, connections });
        }
    }
    Ok((pass, denied))
}

/// The verdict on a connection: that on the packet which would open it now.
fn judge(model: &Model, scope: Scope, from: SocketAddr, to: SocketAddr) -> (Verdict, Reason) {
    let decision = decide(opening(from, to).as_slice(), Listener { scope, port: to.port(), protocol: TCP }, model);
    (decision.verdict, decision.reason)
}

/// The head of a packet from one address to another: as much as a decision reads.
fn opening(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (mut bytes, header) = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            let mut bytes = vec![0; 40];
            (bytes[0], bytes[9]) = (0x45, TCP);
            bytes[12..16].copy_from_slice(&from.ip().octets());
            bytes[16..20].copy_from_slice(&to.ip().octets());
            (bytes, 20)
        }
        (from, to) => {
            let mut bytes = vec![0; 60];
            (bytes[0], bytes[6]) = (0x60, TCP);
            bytes[8..24].copy_from_slice(&address(from));
            bytes[24..40].copy_from_slice(&address(to));
            (bytes, 40)
        }
    };
    bytes[header..header + 2].copy_from_slice(&from.port().to_be_bytes());
    bytes[header + 2..header + 4].copy_from_slice(&to.port().to_be_bytes());
    bytes
}

/// What the kernel's pinholes were when these connections were opened: those of the guard's own sockets are the tunnel's, the others of
/// this namespace the node's.
fn pinholes(dumped: &[TcpSocket], own: &HashSet<u32>) -> BTreeMap<FlowKey, Pinhole> {
    let pinhole = |socket: &TcpSocket| {
        let via = if own.contains(&socket.inode) { Pinhole::TUNNEL } else { Pinhole::NODE };
        let flow = FlowKey {
            source: address(socket.local),
            destination: address(socket.remote),
            source_port: socket.local.port().to_be_bytes(),
            destination_port: socket.remote.port().to_be_bytes(),
        };
        (flow, Pinhole { via })
    };
    dumped.iter().filter(|socket| !socket.listens()).map(pinhole).collect()
}

fn address(address: SocketAddr) -> [u8; 16] {
    match address {
        SocketAddr::V4(address) => mapped(address.ip().octets()),
        SocketAddr::V6(address) => address.ip().octets(),
    }
}

/// One descriptor for each network namespace that a process lives in, this one first.
fn namespaces(own: u64) -> io::Result<Vec<(u64, File)>> {
    let mut found = vec![(own, File::open("/proc/self/ns/net")?)];
    let mut known = HashSet::from([own]);
    for entry in fs::read_dir("/proc")?.flatten() {
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // A process may end at any time: then it has no namespace any more.
        let Ok(namespace) = File::open(entry.path().join("ns/net")) else { continue };
        let id = namespace.metadata()?.ino();
        if known.insert(id) {
            found.push((id, namespace));
        }
    }
    Ok(found)
}

/// Runs code in a network namespace, on a thread of its own.
fn in_namespace<T: Send>(namespace: &File, code: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let enter = || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        code()
    };
    std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|_| Err(io::Error::other("a thread crashed")))
}

/// The sockets of this process, by inode.
fn own_inodes() -> io::Result<HashSet<u32>> {
    let links = fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let inode = |link: std::path::PathBuf| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    Ok(links.filter_map(inode).collect())
}

/// The ids of a cgroup and of those below it: on cgroup v2, the inodes of their directories.
fn cgroup_ids(cgroup: &Path) -> io::Result<HashSet<u64>> {
    let mut ids = HashSet::from([fs::metadata(cgroup)?.ino()]);
    for entry in fs::read_dir(cgroup)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // A cgroup that is gone by now has no sockets that matter.
            ids.extend(cgroup_ids(&entry.path()).unwrap_or_default());
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use guard_common::parse;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_opening_packet_is_read_as_the_connection(from in any::<SocketAddr>(), to in any::<SocketAddr>()) {
            prop_assume!(from.is_ipv4() == to.is_ipv4());
            prop_assume!(from.ip().to_canonical() == from.ip() && to.ip().to_canonical() == to.ip());
            let packet = parse(opening(from, to).as_slice()).unwrap();
            prop_assert_eq!(packet.source, address(from));
            prop_assert_eq!(packet.destination, address(to));
            prop_assert_eq!(packet.source_port, Some(from.port().to_be_bytes()));
        }
    }
}
