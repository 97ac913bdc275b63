//! Owns connections that are older than the ruleset: those to guarded ports that it does not admit are cut.
//! Called by `daemon/edit` after every ruleset that came into force, because the programs judge only new connections.
//! Must never touch a connection that the ruleset admits, that this node or a pod opened, or that is outside the guarded cgroup.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::Path,
    time::Duration,
};

use guard_common::{
    Destination, Listener, LocalCaller, Namespace, Reason, RulesetInForce, Verdict,
    abi::{CgroupKey, CgroupValue, FlowKey, Generation, Pinhole},
    decide,
    packet::{TCP, mapped},
    reach,
};
use guard_policy::tables::{
    host::Model,
    image::{Followed, Image},
};

use crate::kernel::{
    cut::sock_diag::{SockDiag, TcpSocket},
    namespaces::{self, Found, in_namespace},
    syscalls,
};

/// The result of judging all open connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CutSummary {
    /// The number of network namespaces that were examined.
    pub namespaces: usize,
    /// The number of connections to guarded ports.
    pub judged: usize,
    /// The connections that were cut, with the reasons.
    pub cut: Vec<(TcpSocket, Reason)>,
    /// The number of connections that could not be cut.
    pub failed: usize,
    /// Whether some network namespaces may be missing, because not all processes of the node are visible.
    pub blind: bool,
}

/// How long a connection must stay denied before it is cut. The other end of a connection that is closing may be gone already, and the
/// pinhole that admits it is derived from that end.
const CONFIRM: Duration = Duration::from_millis(150);

/// The sockets of one network namespace.
struct Dumped {
    /// Whether it is the node's own.
    is_own: bool,
    /// Its cookie.
    netns: u64,
    namespace: File,
    sockets: Vec<TcpSocket>,
}

/// The denied connections of one network namespace.
struct DeniedConnections {
    namespace: File,
    connections: Vec<(TcpSocket, Reason)>,
}

/// Judges every connection to a listener in every network namespace with a process, and cuts those that the image denies.
pub fn cut_denied(image: &Image, cgroup: &Path) -> io::Result<CutSummary> {
    let mut model = Model { image: image.clone(), ..Model::default() };
    let (mut pass, first) = look(&mut model, cgroup)?;
    if first.is_empty() {
        return Ok(pass);
    }
    std::thread::sleep(CONFIRM);
    let candidates: HashSet<[u8; 8]> =
        first.iter().flat_map(|denied| &denied.connections).map(|(socket, _)| socket.cookie()).collect();
    for DeniedConnections { namespace, mut connections } in look(&mut model, cgroup)?.1 {
        connections.retain(|(socket, _)| candidates.contains(&socket.cookie()));
        for (done, cut) in in_namespace(&namespace, || SockDiag::destroy(&connections))?.into_iter().zip(connections) {
            if done { pass.cut.push(cut) } else { pass.failed += 1 }
        }
    }
    Ok(pass)
}

/// Judges all connections once, and returns the denied ones by network namespace.
fn look(model: &mut Model, cgroup: &Path) -> io::Result<(CutSummary, Vec<DeniedConnections>)> {
    let in_force = model.image.in_force();
    let groups = groups(&in_force, &model.image.entries.followed, cgroup)?;
    let covers_all = crate::kernel::cgroups::root::v2_root().is_ok_and(|root| root == cgroup);
    let own = fs::metadata("/proc/self/ns/net")?.ino();
    let Found { namespaces, incomplete: mut blind } = namespaces::find()?;
    let mut dumped = Vec::new();
    for (id, namespace) in namespaces {
        match in_namespace(&namespace, || Ok((syscalls::netns_cookie()?, SockDiag::dump()?))) {
            Ok((netns, sockets)) => dumped.push(Dumped { is_own: id == own, netns, namespace, sockets }),
            // A namespace that cannot be entered is skipped and reported. The own namespace can always be judged.
            Err(_) if id != own => blind = true,
            Err(error) => return Err(error),
        }
    }
    // The openers are read after the listeners' side: however new a connection is, its opener is in this second dump.
    model.pinholes = pinholes(&SockDiag::dump()?, &own_inodes()?, &groups);
    if groups.values().any(|group| group.caller.roles != 0) {
        for Dumped { namespace, .. } in dumped.iter().filter(|dumped| !dumped.is_own) {
            let callers = in_namespace(namespace, SockDiag::dump)?;
            model.pinholes.extend(callers.iter().filter_map(|socket| opened_by_caller(socket, &groups)));
        }
    }
    let mut pass = CutSummary { namespaces: dumped.len(), blind, ..CutSummary::default() };
    let mut denied = Vec::new();
    for Dumped { is_own, netns, namespace, sockets } in dumped {
        let listening: BTreeSet<u16> =
            sockets.iter().filter(|socket| socket.listens()).map(|socket| socket.local.port()).collect();
        // A connection whose other end is in the same namespace came in over loopback.
        let ends: HashSet<(SocketAddr, SocketAddr)> =
            sockets.iter().map(|socket| (socket.local, socket.remote)).collect();
        let mut connections = Vec::new();
        for socket in sockets.into_iter().filter(|socket| !socket.listens()) {
            let group = socket.cgroup.and_then(|cgroup| groups.get(&cgroup)).copied();
            if group.is_none() && !covers_all {
                continue;
            }
            let group = group.unwrap_or_default();
            let inbound = listening.contains(&socket.local.port()).then(|| {
                let listener = Listener {
                    namespace: if is_own { Namespace::Node } else { Namespace::Pod },
                    netns,
                    over_loopback: ends.contains(&(socket.remote, socket.local)),
                    ..Listener::of_node(socket.local.port(), TCP)
                };
                let in_pods = || group.in_pods || pods_unknown(&in_force);
                let opening = opening(socket.remote, socket.local);
                let decision = decide(opening.as_slice(), listener, in_pods, &in_force, model);
                pass.judged += usize::from(decision.reason != Reason::NotGuarded);
                (decision.verdict == Verdict::Deny).then_some(decision.reason)
            });
            // A companion may listen on the port that it connects from, so that does not make its connection an inbound one.
            let denied = inbound.flatten().or_else(|| companion_denied(model, &in_force, group.caller, socket.remote));
            connections.extend(denied.map(|reason| (socket, reason)));
        }
        if !connections.is_empty() {
            denied.push(DeniedConnections { namespace, connections });
        }
    }
    Ok((pass, denied))
}

/// The roles of a cgroup below the guarded one.
#[derive(Clone, Copy, Debug, Default)]
struct CgroupFacts {
    caller: LocalCaller,
    in_pods: bool,
}

/// Why a connection that the companion opened would be denied now. Connections opened by others are not touched.
fn companion_denied(model: &Model, in_force: &RulesetInForce, caller: LocalCaller, to: SocketAddr) -> Option<Reason> {
    if caller.roles & CgroupValue::COMPANION == 0 {
        return None;
    }
    let destination = Destination { address: address(to), port: to.port(), protocol: TCP };
    let reached = reach(caller, destination, in_force, model);
    reached.denied.filter(|_| reached.verdict == Verdict::Deny)
}

/// Whether a rule guards ports of pods while the cgroup of the pods does not exist. Then every listener outside the node's own network
/// namespace counts as a pod's.
fn pods_unknown(in_force: &RulesetInForce) -> bool {
    in_force.has(Generation::PODS) && in_force.pods_cgroup == 0
}

/// The headers of an opening packet, as far as `decide` reads them.
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

/// The pinholes that the kernel had when the sockets of this namespace connected: `tunnel` for sockets of the guard and of the companion,
/// `node` for all others, and also `caller` for those in a named cgroup.
fn pinholes(dumped: &[TcpSocket], own: &HashSet<u32>, groups: &CgroupTree) -> BTreeMap<FlowKey, Pinhole> {
    let pinhole = |socket: &TcpSocket| {
        if own.contains(&socket.inode) {
            return (flow(socket), Pinhole::of(Pinhole::TUNNEL));
        }
        let mut pinhole = opened_by_caller(socket, groups).map_or_else(Pinhole::default, |(_, pinhole)| pinhole);
        if pinhole.via != Pinhole::TUNNEL {
            pinhole.via |= Pinhole::NODE;
        }
        (flow(socket), pinhole)
    };
    dumped.iter().filter(|socket| !socket.listens()).map(pinhole).collect()
}

/// The pinhole of a socket in a named cgroup.
fn opened_by_caller(socket: &TcpSocket, groups: &CgroupTree) -> Option<(FlowKey, Pinhole)> {
    let LocalCaller { cgroup, roles } = groups.get(&socket.cgroup?)?.caller;
    let via = match roles {
        0 => return None,
        roles if roles & CgroupValue::COMPANION != 0 => Pinhole::TUNNEL,
        _ => Pinhole::CALLER,
    };
    Some((flow(socket), Pinhole { via, reserved: 0, cgroup }))
}

/// The flow of a socket's packets as its peer sees it.
fn flow(socket: &TcpSocket) -> FlowKey {
    FlowKey {
        source: address(socket.local),
        destination: address(socket.remote),
        source_port: socket.local.port().to_be_bytes(),
        destination_port: socket.remote.port().to_be_bytes(),
    }
}

fn address(address: SocketAddr) -> [u8; 16] {
    match address {
        SocketAddr::V4(address) => mapped(address.ip().octets()),
        SocketAddr::V6(address) => address.ip().octets(),
    }
}

/// The inodes of this process's sockets.
fn own_inodes() -> io::Result<HashSet<u32>> {
    let links = fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let inode = |link: std::path::PathBuf| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    Ok(links.filter_map(inode).collect())
}

/// The cgroups below the guarded one, by id. On cgroup v2, the id is the inode of the directory.
type CgroupTree = HashMap<u64, CgroupFacts>;

/// Walks the cgroups below the guarded one.
fn groups(in_force: &RulesetInForce, followed: &Followed, cgroup: &Path) -> io::Result<CgroupTree> {
    let mut groups = CgroupTree::new();
    let mut left = vec![(cgroup.to_path_buf(), CgroupFacts::default())];
    while let Some((path, mut group)) = left.pop() {
        // A cgroup that was removed meanwhile has no sockets.
        let Ok(id) = fs::metadata(&path).map(|metadata| metadata.ino()) else { continue };
        let key = CgroupKey { cgroup: id, generation: u64::from(in_force.key_generation()) };
        if let Some(value) = followed.cgroups.get(&key) {
            group.caller = LocalCaller { cgroup: id, roles: group.caller.roles | value.roles };
        }
        group.in_pods |= id == in_force.pods_cgroup;
        groups.insert(id, group);
        for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push((entry.path(), group));
            }
        }
    }
    if groups.is_empty() { Err(io::Error::from(io::ErrorKind::NotFound)) } else { Ok(groups) }
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
            let packet = parse(opening(from, to).as_slice(), TCP).unwrap();
            prop_assert_eq!(packet.source, address(from));
            prop_assert_eq!(packet.destination, address(to));
            prop_assert_eq!(packet.ports.map(|ports| ports.source), Some(from.port().to_be_bytes()));
        }
    }
}
