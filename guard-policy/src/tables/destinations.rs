//! Owns where processes of this node may connect to: the destinations of the companion, and the control plane's ports.
//! Called by `build`.
//! Must never let a wide prefix include what `authorize` excludes: special addresses and those of the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use guard_common::{abi::DestinationKey, packet::TCP};
use ipnet::{IpNet, Ipv4Net};

use crate::{
    node_facts::NodeFacts,
    parse::checked::{CheckedDocument, CompanionServer},
    refusal::Refusal,
    ruleset::{DestinationPort, DialTarget, RulesetTables, ServiceRange},
    special::{forms, special, special_prefixes},
};

/// A prefix and the ports that may be reached there.
struct ReachablePorts<'a> {
    cidr: IpNet,
    protocol: u8,
    ports: &'a [RangeInclusive<u16>],
    kind: PrefixKind,
}

/// What a prefix means, which decides about the addresses inside it that are set apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PrefixKind {
    /// Everything inside it: a server of the companion, the control plane.
    Server,
    /// An address of this node, which is no special one.
    Node,
    /// Pods: neither special addresses nor the node's own, unless it is exactly that address; no addresses of Services.
    Pods,
    /// Services: neither special addresses nor the node's own.
    Services,
}

/// The prefixes that no wider one includes.
#[derive(Default)]
struct SetApart {
    special: Vec<IpNet>,
    own: Vec<IpNet>,
    /// The kernel looks IPv4 addresses up as IPv4-mapped ones, which a prefix around them must not include.
    every_v4: Option<IpNet>,
    services: ServiceRange,
}

/// Adds both lists of destinations.
pub(crate) fn destinations(tables: &mut RulesetTables, document: &CheckedDocument<'_>, node: &NodeFacts) {
    let mut sets = BTreeMap::new();
    if let Some(hub) = &document.control_plane {
        let reach =
            |cidr: &IpNet| ReachablePorts { cidr: *cidr, protocol: TCP, ports: &hub.ports, kind: PrefixKind::Server };
        let all: Vec<ReachablePorts<'_>> = hub.addresses.iter().map(reach).collect();
        add(tables, &mut sets, DestinationKey::CONTROL_PLANE, &all, &SetApart::default());
    }
    if let Some(companion) = &document.companion {
        let mut all: Vec<ReachablePorts<'_>> = companion
            .servers
            .iter()
            .map(|CompanionServer { cidr, protocol, ports }| ReachablePorts {
                cidr: *cidr,
                protocol: *protocol,
                ports,
                kind: PrefixKind::Server,
            })
            .collect();
        for rule in document.dial {
            let (kind, cidrs) = match &rule.target {
                DialTarget::Node => (PrefixKind::Node, node.addresses.iter().copied().map(IpNet::from).collect()),
                DialTarget::Pods(cidrs) => (PrefixKind::Pods, cidrs.clone()),
                DialTarget::Services(cidrs) => (PrefixKind::Services, cidrs.clone()),
            };
            let reach = |cidr| ReachablePorts { cidr, protocol: TCP, ports: &rule.ports, kind };
            all.extend(cidrs.into_iter().map(reach));
        }
        let apart = SetApart {
            special: special_prefixes().collect(),
            own: node.addresses.iter().copied().map(IpNet::from).flat_map(forms).collect(),
            every_v4: Some(Ipv4Net::default().into()),
            services: document.services.clone(),
        };
        add(tables, &mut sets, DestinationKey::COMPANION, &all, &apart);
    }
    for (ports, set) in &sets {
        let port = |(protocol, port): &(u8, u16)| DestinationPort { set: *set, protocol: *protocol, port: *port };
        tables.destination_ports.extend(ports.iter().map(port));
    }
}

/// A set of ports, each with its protocol.
type PortSet = BTreeSet<(u8, u16)>;

/// Adds one list. Only the longest matching prefix of an address is looked up, so it carries the ports of every prefix that contains it.
fn add(
    tables: &mut RulesetTables,
    sets: &mut BTreeMap<PortSet, u32>,
    list: u32,
    all: &[ReachablePorts<'_>],
    apart: &SetApart,
) {
    let SetApart { special, own, every_v4, services } = apart;
    let others = special.iter().chain(own).chain(every_v4).copied().chain(services.prefixes());
    let prefixes: BTreeSet<IpNet> = all.iter().map(|reach| reach.cidr).chain(others).collect();
    for cidr in prefixes {
        let of_services = services.prefixes().any(|range| range.contains(&cidr));
        let within = |apart: &[IpNet]| apart.iter().any(|apart| apart.contains(&cidr));
        let (is_special, is_own) = (within(special), within(own));
        let holds = |reach: &&ReachablePorts<'_>| {
            reach.cidr.contains(&cidr)
                && match reach.kind {
                    PrefixKind::Server => true,
                    PrefixKind::Node => !is_special,
                    PrefixKind::Services => !is_special && !is_own,
                    PrefixKind::Pods => {
                        (!is_special && !is_own || named_exactly(reach.cidr, cidr))
                            && !(of_services && services.is_cut_out(reach.cidr, cidr.addr()))
                    }
                }
        };
        let ports_of = |reach: &ReachablePorts<'_>| {
            let protocol = reach.protocol;
            reach.ports.iter().cloned().flatten().map(move |port| (protocol, port)).collect::<Vec<_>>()
        };
        let ports: PortSet = all.iter().filter(holds).flat_map(ports_of).collect();
        let next = sets.len() as u32;
        let set = *sets.entry(ports).or_insert(next);
        tables.destinations.insert((list, cidr), set);
    }
}

/// Whether a dial rule names an address itself that is set apart: then `authorize` admits it too, except where it never does.
fn named_exactly(named: IpNet, cidr: IpNet) -> bool {
    named == cidr
        && named.prefix_len() == named.max_prefix_len()
        && !matches!(special(named.addr()), Some(Refusal::Multicast | Refusal::Unspecified))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use proptest::prelude::*;

    use super::*;
    use crate::{authorize::authorize, compile::compile, diagnostic::Source, ruleset::Ruleset};

    fn ruleset(tunnel: &str, hub: &str) -> Ruleset {
        let text = format!(
            "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: t}}\nspec: {{mode: Enforce, guard: [], tunnel: {tunnel}{hub}}}\n"
        );
        let source = Source { path: "t".into(), text };
        compile(&source, &node()).unwrap_or_else(|findings| panic!("{}", source.render(&findings, false))).0
    }

    fn node() -> NodeFacts {
        NodeFacts { addresses: vec!["10.0.0.7".parse().unwrap()], ..NodeFacts::default() }
    }

    /// What one look-up in the tables says: `None` where no prefix holds the address. As in the kernel, IPv4 is inside IPv6.
    fn reached(tables: &RulesetTables, list: u32, to: SocketAddr, protocol: u8) -> Option<bool> {
        let mapped = |address: IpAddr| match address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        let prefix = |cidr: &IpNet| {
            let length = 128 - (cidr.max_prefix_len() - cidr.prefix_len());
            ipnet::Ipv6Net::new(mapped(cidr.addr()), length).unwrap()
        };
        let of_list = tables.destinations.iter().filter(|((of, _), _)| *of == list);
        let holds = of_list.filter(|((_, cidr), _)| prefix(cidr).contains(&mapped(to.ip())));
        let (_, set) = holds.max_by_key(|((_, cidr), _)| prefix(cidr).prefix_len())?;
        Some(tables.destination_ports.contains(&DestinationPort { set: *set, protocol, port: to.port() }))
    }

    const TUNNEL: &str = "{dial: [node: {ports: [10250]}, pods: {cidrs: [0.0.0.0/0, 10.244.0.0/16], ports: [80]}, pods: {cidrs: [10.244.1.0/24, 127.0.0.5/32, 224.0.0.9/32, 169.254.1.0/24], ports: [81-82]}, pods: {cidrs: ['::/0', 100.100.100.200/32, '64:ff9b:1::9/128', '::2/128', 10.0.0.7/32], ports: [83]}, services: {cidrs: [0.0.0.0/1, '2002::/16'], ports: [443]}], companion: {cgroup: /c, servers: [{cidr: 127.0.0.1/32, ports: [8132]}, {cidr: 10.0.0.53/32, ports: [53], protocol: UDP}]}}";

    #[test]
    fn the_companion_reaches_a_service_only_where_a_dial_would() {
        let tunnel = |dial: &str, range: &str| {
            format!(
                "{{dial: [{dial}], {range}companion: {{cgroup: /c, servers: [{{cidr: 127.0.0.1/32, ports: [8132]}}]}}}}"
            )
        };
        let wide = "pods: {cidrs: [10.0.0.0/8, 10.97.0.0/16], ports: [1-65535]}";
        let both = format!("{wide}, services: {{cidrs: [10.96.0.0/16], ports: [443]}}");
        for node in ["10.96.0.1", "10.0.0.1", "10.96.0.9"].map(|host| NodeFacts {
            addresses: vec!["10.128.0.7".parse().unwrap()],
            service_host: Some(host.parse().unwrap()),
            ..NodeFacts::default()
        }) {
            for (dial, range) in [
                (wide, ""),
                (wide, "serviceCidrs: [10.96.0.0/15], "),
                (&both, ""),
                (&both, "serviceCidrs: [10.96.0.0/15], "),
            ] {
                let text = format!(
                    "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: t}}\nspec: {{mode: Enforce, guard: [], tunnel: {}}}\n",
                    tunnel(dial, range)
                );
                // A prefix of pods inside the declared range is an error.
                let text = if range.is_empty() { text } else { text.replace(", 10.97.0.0/16", "") };
                let ruleset = compile(&Source { path: "t".into(), text }, &node).unwrap().0;
                for to in [
                    "10.96.3.4:443",
                    "10.96.3.4:80",
                    "10.97.3.4:443",
                    "10.98.3.4:443",
                    "10.0.3.4:80",
                    "10.16.3.4:80",
                    "10.244.0.1:80",
                    "10.128.0.7:80",
                ] {
                    let to: SocketAddr = to.parse().unwrap();
                    let dialled = authorize(Some(&ruleset), &node, to).is_ok();
                    let reached = reached(&ruleset.tables, DestinationKey::COMPANION, to, 6) == Some(true);
                    assert_eq!(reached, dialled, "{to} {dial} {range} {:?}", node.service_host);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn the_companion_may_go_where_a_dial_may(
            address in prop::sample::select(vec!["10.0.0.7", "168.63.129.16", "100.100.100.200", "64:ff9b::a00:7", "64:ff9b::a9fe:a9fe", "64:ff9b:1::9", "2002:a00:7::1", "2002:a9fe:a9fe::1", "2002:808:808::1", "fd00:ec2::254", "fd00:ec2::253", "::a9fe:1", "::2", "10.244.0.1", "10.244.1.1", "127.0.0.1", "127.0.0.5", "127.0.0.6", "169.254.169.254", "169.254.1.7", "224.0.0.9", "0.0.0.0", "255.255.255.255", "1.2.3.4", "192.0.2.1", "::1", "fd00::1"]),
            port in prop::sample::select(vec![53u16, 80, 81, 82, 83, 443, 8132, 10_250]),
        ) {
            let ruleset = ruleset(TUNNEL, "");
            let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
            let dialled = authorize(Some(&ruleset), &node(), to).is_ok();
            let server = address == "127.0.0.1" && port == 8132;
            prop_assert_eq!(reached(&ruleset.tables, DestinationKey::COMPANION, to, 6) == Some(true), dialled || server, "{}", to);
            prop_assert_eq!(reached(&ruleset.tables, DestinationKey::COMPANION, to, 17) == Some(true), false);
        }
    }

    #[test]
    fn a_servers_protocol_is_its_own() {
        let tables = ruleset(TUNNEL, "").tables;
        let to = "10.0.0.53:53".parse().unwrap();
        assert_eq!(reached(&tables, DestinationKey::COMPANION, to, 17), Some(true));
        assert_eq!(reached(&tables, DestinationKey::COMPANION, to, 6), Some(false));
    }

    #[test]
    fn the_hub_rule_speaks_of_its_addresses_alone() {
        let tables =
            ruleset("{dial: []}", ", controlPlane: {addresses: [10.9.0.0/24, 10.9.0.5/32], ports: [6443, 8132]}")
                .tables;
        let reach = |to: &str, protocol| reached(&tables, DestinationKey::CONTROL_PLANE, to.parse().unwrap(), protocol);
        assert_eq!(reach("10.9.0.5:6443", 6), Some(true));
        assert_eq!(reach("10.9.0.5:2379", 6), Some(false));
        assert_eq!(reach("10.9.0.5:6443", 17), Some(false));
        assert_eq!(reach("10.9.0.9:22", 6), Some(false));
        assert_eq!(reach("10.9.1.9:22", 6), None);
    }
}
