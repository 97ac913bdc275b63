//! Owns the judgement on a dial: whether the control plane may reach an address. A pure function.
//! Called by `dial/serve` for each resolved address before it connects, and by `dial/connections` when the ruleset changes.
//! Must never judge a name: it judges the address that is dialled.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use crate::{
    node_facts::NodeFacts,
    refusal::Refusal,
    ruleset::{DialDemands, DialRule, DialTarget, Ruleset},
    special::special,
};

/// Proof that a dial was authorized. Only [`authorize`] can build a permit, and connecting requires one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    address: SocketAddr,
    rule: String,
    demands: DialDemands,
    own: bool,
    to_service: bool,
}

impl Permit {
    /// The address that may be dialled.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The first entry of `tunnel.dial` that allows the dial, as in `tunnel.dial[0]`.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// The demands of all entries that name the address and the port.
    pub fn demands(&self) -> &DialDemands {
        &self.demands
    }

    /// Whether the address is one of the node's own.
    pub fn own(&self) -> bool {
        self.own
    }

    /// Whether an entry names the address as a Service's. Then it is meant to be translated.
    pub fn to_service(&self) -> bool {
        self.to_service
    }
}

/// Judges a dial to one address. Without a ruleset every dial is refused.
///
/// An IPv4-mapped IPv6 address is judged as the IPv4 address, and an unspecified address as loopback, because that is what the kernel connects
/// to. The permit holds the address that may be dialled. The [`Refusal`] says why a dial is refused; it is a decision, not a failure.
pub fn authorize(ruleset: Option<&Ruleset>, node: &NodeFacts, address: SocketAddr) -> Result<Permit, Refusal> {
    let ruleset = ruleset.ok_or(Refusal::NoPolicy)?;
    // The kernel treats an IPv4-mapped IPv6 address as the IPv4 address, so the policy does too.
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let special = special(address.ip());
    let address = SocketAddr::new(meant(address.ip()), address.port());
    let own = node.owns(address.ip());
    let (mut refusal, mut withheld) = (Refusal::AddressNotNamed, false);
    let mut permit: Option<Permit> = None;
    for rule in &ruleset.dial {
        let of_service = |pods: IpNet| ruleset.services.is_cut_out(pods, address.ip());
        let (around, exactly) = match &rule.target {
            DialTarget::Node => (false, special.is_none() && node.addresses.contains(&address.ip())),
            DialTarget::Pods(cidrs) => (
                cidrs.iter().any(|cidr| cidr.contains(&address.ip()) && !of_service(*cidr)),
                rule.names_exactly(address.ip()) && !of_service(address.ip().into()),
            ),
            DialTarget::Services(cidrs) => (cidrs.iter().any(|cidr| cidr.contains(&address.ip())), false),
        };
        // No wider prefix means a special address, nor an address of this node.
        let names = exactly || (around && special.is_none() && !own);
        withheld |= around && !names && rule.has_port(address.port());
        if names && rule.has_port(address.port()) {
            match special {
                Some(never @ Refusal::Multicast) => return Err(never),
                Some(never @ Refusal::Unspecified) if !address.ip().is_loopback() => return Err(never),
                Some(_) | None => {}
            }
            let permit = permit.get_or_insert_with(|| Permit {
                address,
                rule: rule.name.clone(),
                demands: DialDemands::default(),
                own,
                to_service: false,
            });
            permit.demands.join(&rule.demands);
            permit.to_service |= matches!(rule.target, DialTarget::Services(_));
        } else if names {
            refusal = Refusal::PortNotNamed;
        }
    }
    if let Some(permit) = permit {
        return Ok(permit);
    }
    let for_the_node = |rule: &DialRule| rule.target == DialTarget::Node && rule.has_port(address.port());
    if own && withheld {
        refusal = Refusal::OwnAddress;
    } else if refusal == Refusal::AddressNotNamed {
        // The loop above has admitted the node's own addresses at this port, so this is not one of them.
        let another_node = ruleset.dial.iter().any(for_the_node);
        if ruleset.services.is_declared(address.ip()) || (ruleset.services.may_hold(address.ip()) && !another_node) {
            refusal = Refusal::ServiceAddress;
        } else if another_node {
            refusal = Refusal::AnotherNode;
        }
    }
    Err(special.unwrap_or(refusal))
}

/// Connecting to an unspecified address connects to loopback. So the loopback address is judged and dialled.
fn meant(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(_) | IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        compile::compile,
        diagnostic::Source,
        special::{forms, special_prefixes},
    };

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
            "168.63.129.16:80",
            "[fd00:ec2::254]:80",
            "[64:ff9b::169.254.169.254]:80",
            "[64:ff9b:1::1]:80",
            "[2002:a9fe:a9fe::]:80",
        ] {
            assert!(authorize(Some(&ruleset), &node(), address.parse().unwrap()).is_err(), "{address}");
        }
        assert!(authorize(Some(&ruleset), &node(), "10.1.2.3:1".parse().unwrap()).is_ok());
    }

    #[test]
    fn an_address_of_this_node_is_node_and_nothing_else() {
        let judge = |dial: &str, address: &str| {
            let verdict = authorize(Some(&ruleset(dial)), &node(), address.parse().unwrap());
            verdict.map(|permit| permit.rule().to_owned())
        };
        let wide = "[{node: {ports: [10250]}, tls: Required}, pods: {cidrs: [10.0.0.0/8, 'fd00::/8', '64:ff9b::/96', '2002::/16'], ports: [1-65535]}, services: {cidrs: [10.0.0.0/24], ports: [443]}]";
        assert_eq!(judge(wide, "10.0.0.7:10250"), Ok("tunnel.dial[0]".to_owned()));
        assert_eq!(judge(wide, "10.0.0.8:22"), Ok("tunnel.dial[1]".to_owned()));
        for own in ["10.0.0.7", "[fd00::7]", "[::ffff:10.0.0.7]", "[64:ff9b::10.0.0.7]", "[2002:a00:7::1]"] {
            for port in [22, 443] {
                assert_eq!(judge(wide, &format!("{own}:{port}")), Err(Refusal::OwnAddress), "{own}:{port}");
            }
        }
        assert_eq!(
            judge("[node: {ports: [10250]}, pods: {cidrs: [10.0.0.0/8], ports: [80]}]", "10.0.0.7:22"),
            Err(Refusal::PortNotNamed)
        );
        // A prefix of exactly this address means it.
        let exact = "[pods: {cidrs: [10.0.0.0/8, 10.0.0.7/32], ports: [22]}]";
        assert_eq!(judge(exact, "10.0.0.7:22"), Ok("tunnel.dial[0]".to_owned()));
        assert_eq!(judge(exact, "[64:ff9b::10.0.0.7]:22"), Err(Refusal::AddressNotNamed));
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
        assert!(both.demands().exceed(&DialDemands::default()) && !DialDemands::default().exceed(both.demands()));
        assert!(!both.demands().exceed(both.demands()));
    }

    proptest! {
        #[test]
        fn no_wider_prefix_admits_a_special_address_or_one_of_this_node(bits: u128, length in 0u8..128, special_one: bool, port in 1u16..9) {
            let special: Vec<IpNet> = special_prefixes().chain(forms("10.0.0.7/32".parse().unwrap())).collect();
            let prefix = special[(bits >> 64) as usize % special.len()];
            let address = if special_one { prefix.network() } else { std::net::Ipv6Addr::from_bits(bits).into() };
            let wide = IpNet::new(address, length % prefix.max_prefix_len()).unwrap().trunc();
            let ruleset = ruleset(&format!("[pods: {{cidrs: ['{wide}'], ports: [1-8]}}, services: {{cidrs: ['{wide}'], ports: [1-8]}}]"));
            let verdict = authorize(Some(&ruleset), &node(), SocketAddr::new(address, port));
            let apart = special.iter().any(|prefix| prefix.contains(&address)) || node().addresses.contains(&address);
            prop_assert_eq!(verdict.is_err(), apart, "{} in {}: {:?}", address, wide, verdict);
        }

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
