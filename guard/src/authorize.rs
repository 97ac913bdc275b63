//! Owns the judgement on a dial: may the control plane reach this address? A pure function.
//! Called by `dial` on each resolved address before it connects, and by `connections` when the ruleset changes.
//! Must never be asked about a name: what is judged is the address that is then dialled.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    node::NodeFacts,
    policy::ruleset::{Demands, DialRule, DialTarget, Ruleset},
};

/// Proof that a dial was authorized. Only [`authorize`] makes one, and connecting takes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    address: SocketAddr,
    rule: String,
    demands: Demands,
}

impl Permit {
    /// The address that may be dialled.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The first rule that allows it: `tunnel.dial[0]`.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// What every rule that names the address and port asks of the connection.
    pub fn demands(&self) -> &Demands {
        &self.demands
    }
}

/// Why a dial is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No policy is in force.
    NoPolicy,
    /// No entry of `tunnel.dial` names the address.
    AddressNotNamed,
    /// An entry names the address, but not the port.
    PortNotNamed,
    /// Nobody's address that is known here, at a port that an entry names for this node's own: most likely another node's.
    AnotherNode,
    /// A Service's address, and nobody says which pods are behind it.
    ServiceAddress,
    /// The Services of the cluster are known, and none has this address and port.
    ServiceUnknown,
    /// A Service without an endpoint that takes connections.
    ServiceNotReady,
    /// The Services of the cluster are to be known, and were never read.
    ServicesUnread,
    /// What the backend shows is not what `certificate` asks for.
    KubeletCertificate,
    /// Loopback, which reaches what trusts its own node.
    Loopback,
    /// Link-local, which is where clouds serve credentials.
    LinkLocal,
    /// A multicast or broadcast address.
    Multicast,
    /// An unspecified address, which means this node.
    Unspecified,
    /// Not TCP.
    Protocol,
    /// Not `host:port`.
    Malformed,
    /// The agent is draining or at its limit of dials.
    Busy,
}

impl Refusal {
    /// Every one.
    pub const ALL: [Refusal; 16] = [
        Refusal::NoPolicy,
        Refusal::AddressNotNamed,
        Refusal::PortNotNamed,
        Refusal::AnotherNode,
        Refusal::ServiceAddress,
        Refusal::ServiceUnknown,
        Refusal::ServiceNotReady,
        Refusal::ServicesUnread,
        Refusal::KubeletCertificate,
        Refusal::Loopback,
        Refusal::LinkLocal,
        Refusal::Multicast,
        Refusal::Unspecified,
        Refusal::Protocol,
        Refusal::Malformed,
        Refusal::Busy,
    ];

    /// The stable name: a word in the audit line, in `status` and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::NoPolicy => "no-policy",
            Refusal::AddressNotNamed => "address-not-named",
            Refusal::PortNotNamed => "port-not-named",
            Refusal::AnotherNode => "another-node",
            Refusal::ServiceAddress => "service-address",
            Refusal::ServiceUnknown => "service-unknown",
            Refusal::ServiceNotReady => "service-not-ready",
            Refusal::ServicesUnread => "services-unread",
            Refusal::KubeletCertificate => "kubelet-certificate",
            Refusal::Loopback => "loopback",
            Refusal::LinkLocal => "link-local",
            Refusal::Multicast => "multicast",
            Refusal::Unspecified => "unspecified",
            Refusal::Protocol => "protocol",
            Refusal::Malformed => "malformed",
            Refusal::Busy => "busy",
        }
    }
}

/// What the control plane's user reads. Free of words that the server would take for another kind of failure.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::NoPolicy => "no policy is in force on this node",
            Refusal::AddressNotNamed => "no entry of tunnel.dial names this address",
            Refusal::PortNotNamed => "tunnel.dial names this address with other ports only",
            Refusal::AnotherNode => {
                "this is no address of this node, and tunnel.dial names the port for this node's own addresses: if it is another node's, \
                 the proxy-server chose the wrong agent; start it with --proxy-strategies=destHost,default (or destHost,defaultRoute), \
                 and let every agent advertise its addresses"
            }
            Refusal::ServiceAddress => {
                "this is a Service's address (ClusterIP), and the guard does not know which pods are behind it: give it read access to \
                 EndpointSlices (deploy/services.yaml, --watch-services), so that it picks one and judges its address; or name the range \
                 in tunnel.dial as `services`, and allow what the pods then see by `ipBlock`"
            }
            Refusal::ServiceUnknown => "no Service of the cluster has this address and port",
            Refusal::ServiceNotReady => "the Service has no endpoint that takes connections",
            Refusal::ServicesUnread => {
                "the Services of the cluster were not read yet (--watch-services): does the API server answer, and does it let the guard \
                 read Services and EndpointSlices (deploy/services.yaml)"
            }
            Refusal::KubeletCertificate => "the serving certificate is not the one that tunnel.dial asks for",
            Refusal::Loopback => "loopback addresses are not dialled unless tunnel.dial names exactly this one",
            Refusal::LinkLocal => "link-local addresses are not dialled unless tunnel.dial names exactly this one",
            Refusal::Multicast => "multicast and broadcast addresses are not dialled",
            Refusal::Unspecified => {
                "unspecified addresses mean loopback, which is not dialled unless tunnel.dial names exactly this one"
            }
            Refusal::Protocol => "only tcp is dialled",
            Refusal::Malformed => "the address is not host:port",
            Refusal::Busy => "the guard takes no more dials now",
        })
    }
}

/// Judges one address under a ruleset.
pub fn authorize(ruleset: Option<&Ruleset>, node: &NodeFacts, address: SocketAddr) -> Result<Permit, Refusal> {
    let ruleset = ruleset.ok_or(Refusal::NoPolicy)?;
    // An IPv4 address in IPv6 clothes is the IPv4 address to the kernel, and so to the policy.
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let special = special(address.ip());
    let address = SocketAddr::new(meant(address.ip()), address.port());
    let mut refusal = Refusal::AddressNotNamed;
    let mut permit: Option<Permit> = None;
    for rule in &ruleset.dial {
        let names = match &rule.target {
            DialTarget::Node => special.is_none() && node.addresses.contains(&address.ip()),
            DialTarget::Pods(cidrs) if special.is_none() => cidrs
                .iter()
                .any(|cidr| cidr.contains(&address.ip()) && !ruleset.services.is_cut_out(*cidr, address.ip())),
            DialTarget::Services(cidrs) => special.is_none() && cidrs.iter().any(|cidr| cidr.contains(&address.ip())),
            DialTarget::Pods(_) => rule.names_exactly(address.ip()),
        };
        if names && rule.has_port(address.port()) {
            match special {
                Some(never @ Refusal::Multicast) => return Err(never),
                Some(never @ Refusal::Unspecified) if !address.ip().is_loopback() => return Err(never),
                Some(_) | None => {}
            }
            let permit =
                permit.get_or_insert_with(|| Permit { address, rule: rule.name.clone(), demands: Demands::default() });
            permit.demands.join(&rule.demands);
        } else if names {
            refusal = Refusal::PortNotNamed;
        }
    }
    if let Some(permit) = permit {
        return Ok(permit);
    }
    let for_the_node = |rule: &DialRule| rule.target == DialTarget::Node && rule.has_port(address.port());
    if refusal == Refusal::AddressNotNamed {
        // The node's own addresses were named above.
        let another_node = ruleset.dial.iter().any(for_the_node);
        if ruleset.services.is_declared(address.ip()) || (ruleset.services.may_hold(address.ip()) && !another_node) {
            refusal = Refusal::ServiceAddress;
        } else if another_node {
            refusal = Refusal::AnotherNode;
        }
    }
    Err(special.unwrap_or(refusal))
}

/// Connecting to the unspecified address connects to loopback, so that is what is judged and dialled.
fn meant(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(_) | IpAddr::V6(_) => address,
    }
}

/// The addresses that are never dialled because a prefix happens to hold them.
pub(crate) fn special(address: IpAddr) -> Option<Refusal> {
    match address {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some(Refusal::Unspecified),
        IpAddr::V4(v4) if v4.is_loopback() => Some(Refusal::Loopback),
        IpAddr::V4(v4) if v4.is_link_local() => Some(Refusal::LinkLocal),
        IpAddr::V4(v4) if v4.is_multicast() || v4.is_broadcast() => Some(Refusal::Multicast),
        IpAddr::V6(v6) if v6.is_unspecified() => Some(Refusal::Unspecified),
        IpAddr::V6(v6) if v6.is_loopback() => Some(Refusal::Loopback),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some(Refusal::LinkLocal),
        IpAddr::V6(v6) if v6.is_multicast() => Some(Refusal::Multicast),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;
    use crate::policy::{compile::compile, diagnostic::Source};

    fn ruleset(dial: &str) -> Ruleset {
        let text = format!(
            "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: t}}\nspec: {{mode: Enforce, guard: [], tunnel: {{dial: {dial}}}}}\n"
        );
        compile(&Source { path: "t".into(), text }, &NodeFacts::default()).unwrap().0
    }

    fn node() -> NodeFacts {
        NodeFacts { addresses: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()], ..NodeFacts::default() }
    }

    #[test]
    fn only_what_the_policy_names_is_dialled() {
        let ruleset = ruleset(
            "[node: {ports: [10250]}, pods: {cidrs: [10.244.1.0/24, 'fd00:1::/64'], ports: [8080, 9000-9001]}, pods: {cidrs: [169.254.20.10/32, 127.0.0.1/32], ports: [53]}]",
        );
        let cases = [
            ("10.0.0.7:10250", Ok("tunnel.dial[0]")),
            ("[fd00::7]:10250", Ok("tunnel.dial[0]")),
            ("[::ffff:10.0.0.7]:10250", Ok("tunnel.dial[0]")),
            ("10.0.0.7:22", Err(Refusal::PortNotNamed)),
            ("10.0.0.8:10250", Err(Refusal::AnotherNode)),
            ("[::ffff:10.0.0.8]:10250", Err(Refusal::AnotherNode)),
            ("10.0.0.8:8080", Err(Refusal::AddressNotNamed)),
            ("10.244.1.9:10250", Err(Refusal::PortNotNamed)),
            ("10.244.1.9:9001", Ok("tunnel.dial[1]")),
            ("[fd00:1::9]:8080", Ok("tunnel.dial[1]")),
            ("10.244.1.9:9002", Err(Refusal::PortNotNamed)),
            ("10.244.2.9:8080", Err(Refusal::AddressNotNamed)),
            ("169.254.169.254:80", Err(Refusal::LinkLocal)),
            ("169.254.20.10:53", Ok("tunnel.dial[2]")),
            ("127.0.0.1:53", Ok("tunnel.dial[2]")),
            ("127.0.0.1:22", Err(Refusal::Loopback)),
            ("127.0.0.2:53", Err(Refusal::Loopback)),
            ("[::ffff:127.0.0.1]:22", Err(Refusal::Loopback)),
            ("[::1]:10250", Err(Refusal::Loopback)),
            ("0.0.0.0:10250", Err(Refusal::Unspecified)),
            ("0.0.0.0:53", Ok("tunnel.dial[2]")),
            ("0.0.0.1:53", Err(Refusal::Unspecified)),
            ("[::]:10250", Err(Refusal::Unspecified)),
            ("224.0.0.1:8080", Err(Refusal::Multicast)),
            ("255.255.255.255:8080", Err(Refusal::Multicast)),
            ("[fe80::1]:8080", Err(Refusal::LinkLocal)),
        ];
        for (address, want) in cases {
            let verdict = authorize(Some(&ruleset), &node(), address.parse().unwrap());
            assert_eq!(verdict.as_ref().map(Permit::rule).map_err(|refusal| *refusal), want, "{address}");
        }
        assert_eq!(authorize(None, &node(), "10.0.0.7:10250".parse().unwrap()), Err(Refusal::NoPolicy));
    }

    #[test]
    fn a_prefix_around_everything_still_leaves_the_special_addresses_out() {
        let ruleset = ruleset("[pods: {cidrs: [0.0.0.0/0, '::/0', 224.0.0.1/32, 0.0.0.0/32], ports: [1-65535]}]");
        for address in [
            "127.0.0.1:1",
            "169.254.169.254:80",
            "224.0.0.1:1",
            "0.0.0.0:1",
            "[::1]:1",
            "[fe80::1]:1",
            "[ff02::1]:1",
            "[::ffff:169.254.169.254]:80",
        ] {
            assert!(authorize(Some(&ruleset), &node(), address.parse().unwrap()).is_err(), "{address}");
        }
        assert!(authorize(Some(&ruleset), &node(), "10.1.2.3:1".parse().unwrap()).is_ok());
    }

    #[test]
    fn what_any_entry_asks_for_is_asked() {
        let ruleset = ruleset(
            "[pods: {cidrs: [10.0.0.0/8], ports: [80-90]}, {pods: {cidrs: [10.1.0.0/16], ports: [80]}, tls: Required}, {node: {ports: [10250]}, certificate: {ca: /a}}, {node: {ports: [10250]}, certificate: {ca: /b}}]",
        );
        let permit = |address: &str| authorize(Some(&ruleset), &node(), address.parse().unwrap()).unwrap();
        assert!(!permit("10.2.0.1:80").demands().tls && !permit("10.1.0.1:81").demands().tls);
        assert!(permit("10.1.0.1:80").demands().tls);
        let both = permit("10.0.0.7:10250");
        assert_eq!((both.rule(), both.demands().certificates.len()), ("tunnel.dial[2]", 2));
        assert!(both.demands().exceed(&Demands::default()) && !Demands::default().exceed(both.demands()));
        assert!(!both.demands().exceed(both.demands()));
    }

    proptest! {
        #[test]
        fn a_permit_is_for_an_address_and_a_port_that_a_rule_names(bytes in any::<[u8; 4]>(), port in 1u16..20) {
            let ruleset = ruleset("[node: {ports: [7]}, pods: {cidrs: [10.0.0.0/14, 192.0.0.0/2], ports: [8-9]}]");
            let address = SocketAddr::from((bytes, port));
            let held = ["10.0.0.0/14", "192.0.0.0/2"].iter().any(|cidr| cidr.parse::<IpNet>().unwrap().contains(&address.ip()));
            let wanted = special(address.ip()).is_none() && ((held && (8..=9).contains(&port)) || (node().addresses.contains(&address.ip()) && port == 7));
            let verdict = authorize(Some(&ruleset), &node(), address);
            prop_assert_eq!(verdict.is_ok(), wanted);
            if let Ok(permit) = verdict {
                prop_assert_eq!(permit.address(), address);
            }
        }
    }
}
