//! Owns parsing the service range: which addresses the document declares as Services' (ClusterIPs), and which are guessed.
//! Called by `compile` and `rules`.
//! Must never let a guess do more than narrow a prefix that contains ClusterIPs, and choose the reason of a refusal.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_saphyr::Spanned;

use crate::{
    diagnostic::Diagnostic,
    document::{Document, PodPorts, ServicePorts, TunnelSpec, span},
    node_facts::NodeFacts,
    parse::{checked::GuardRule, scalars::Findings},
    ruleset::{DialTarget, GuessedRange, ServiceRange},
};

/// The shortest prefix that Kubernetes accepts for IPv4 and IPv6 (`kube-apiserver`: "the mask must be >= 12", and 20 bits of an IPv6 address).
const WIDEST: (u8, u8) = (12, 108);
/// The longest prefix that is guessed. A smaller range more likely means that the API server has an address outside the service range.
const SMALLEST: (u8, u8) = (24, 120);

/// The largest service range that begins with this address and contains no address of this node.
pub(crate) fn guess(first: IpAddr, own: &[IpAddr]) -> Option<GuessedRange> {
    let (network, widest, smallest) = match first {
        IpAddr::V4(first) => {
            let network = u32::from(first).checked_sub(1)?;
            let length = 32 - u8::try_from(network.trailing_zeros()).ok()?.min(32);
            (IpAddr::from(Ipv4Addr::from(network)), length.max(WIDEST.0), SMALLEST.0)
        }
        IpAddr::V6(first) => {
            let network = u128::from(first).checked_sub(1)?;
            let length = 128 - u8::try_from(network.trailing_zeros()).ok()?.min(128);
            (IpAddr::from(Ipv6Addr::from(network)), length.max(WIDEST.1), SMALLEST.1)
        }
    };
    let range = |length| -> Option<IpNet> {
        Some(match network {
            IpAddr::V4(network) => Ipv4Net::new(network, length).ok()?.into(),
            IpAddr::V6(network) => Ipv6Net::new(network, length).ok()?.into(),
        })
    };
    let fits = |range: &IpNet| !own.iter().any(|own| range.contains(own));
    let range = (widest..=smallest).filter_map(range).find(fits)?;
    Some(GuessedRange { first, range })
}

const RANGE: &str = "kube-apiserver has the range in --service-cluster-ip-range (kubeadm: networking.serviceSubnet)";

/// Parses `tunnel.serviceCidrs`, and guesses the range if the document declares none of that address family.
pub(crate) fn parse_range(tunnel: &TunnelSpec, node: &NodeFacts, findings: &mut Findings) -> ServiceRange {
    let written = tunnel.service_cidrs.as_ref();
    let declared: Vec<IpNet> = written.map(|cidrs| findings.cidrs(cidrs, RANGE)).unwrap_or_default();
    let said = |host: &IpAddr| declared.iter().any(|cidr| cidr.addr().is_ipv4() == host.is_ipv4());
    let guessed = node.service_host.filter(|host| !said(host)).and_then(|host| guess(host, &node.addresses));
    ServiceRange { declared, guessed }
}

/// Parses `services` of an entry of `tunnel.dial`.
pub(crate) fn parse_services(
    name: &str,
    services: &Spanned<ServicePorts>,
    range: &ServiceRange,
    findings: &mut Findings,
) -> (DialTarget, Vec<RangeInclusive<u16>>) {
    let ServicePorts { cidrs, ports, protocol } = &services.value;
    findings.only_tcp(protocol.as_ref());
    let cidrs = match cidrs {
        Some(cidrs) => findings.cidrs(cidrs, RANGE),
        None => range.declared.clone(),
    };
    if cidrs.is_empty() && services.value.cidrs.is_none() {
        findings.add(
            Diagnostic::error(
                "NG020",
                span(services),
                format!("`{name}` names Services, but no service range is declared"),
                "add `cidrs: [...]` here, or `serviceCidrs: [...]` to `tunnel`",
            )
            .help(RANGE),
        );
    }
    (DialTarget::Services(cidrs), findings.ports(ports))
}

/// Reports a prefix of pods that lies inside the declared service range.
pub(crate) fn check_pods(cidrs: &[IpNet], pods: &Spanned<PodPorts>, range: &ServiceRange, findings: &mut Findings) {
    let inside = |cidr: &&IpNet| range.declared.iter().any(|declared| declared.contains(*cidr));
    if let Some(cidr) = cidrs.iter().find(inside) {
        findings.add(
            Diagnostic::error(
                "NG021",
                span(pods),
                format!("`{cidr}` in `pods` lies inside `serviceCidrs`"),
                "no pod has an address in the service range",
            )
            .help("to dial these addresses without change, write `services` instead of `pods`"),
        );
    }
}

/// Warns if connections to Services will not match `tunnel` in a rule for pods.
pub(crate) fn check_rules(document: &Document, rules: &[GuardRule], findings: &mut Findings) {
    let deaf = |rule: &&GuardRule| !rule.pods.is_empty() && rule.tunnel && rule.blocks.is_empty();
    let Some(rule) = rules.iter().find(deaf) else { return };
    // One that names more than Services is an error already.
    let of_services = document.spec.tunnel.dial.iter().filter(|dial| dial.node.is_none() && dial.pods.is_none());
    for services in of_services.filter_map(|dial| dial.services.as_ref()) {
        findings.add(
            Diagnostic::warning(
                "NG106",
                span(services),
                format!("these connections will not match `tunnel` in rule `{}`", rule.name),
                "kube-proxy rewrites them on the way, so pods see another source address",
            )
            .help("let the guard read EndpointSlices (--watch-services), or allow the source address by `ipBlock`; audit mode shows it"),
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        authorize::authorize,
        compile::compile,
        diagnostic::{Severity, Source},
        refusal::Refusal,
        ruleset::Ruleset,
    };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_range_is_guessed_from_its_first_address_or_not_at_all() {
        for (first, own, want) in [
            ("10.96.0.1", "10.0.0.7", Some("10.96.0.0/12")),
            ("10.43.0.1", "10.0.0.7", Some("10.43.0.0/16")),
            ("172.20.0.1", "10.0.0.7", Some("172.20.0.0/14")),
            ("10.0.0.1", "10.224.0.4", Some("10.0.0.0/12")),
            // The node's own network is no service range.
            ("10.0.0.1", "10.1.0.4", Some("10.0.0.0/16")),
            ("10.0.0.1", "10.0.0.7", None),
            // An API server of its own address.
            ("192.168.7.10", "10.0.0.7", None),
            ("10.96.0.2", "10.0.0.7", None),
            ("fd00:10:96::1", "fd00::7", Some("fd00:10:96::/108")),
            ("fd00::1", "fd00::7", None),
            ("0.0.0.0", "10.0.0.7", None),
            ("::", "::1", None),
        ] {
            let range = guess(ip(first), &[ip(own)]).map(|guess| guess.range);
            assert_eq!(range, want.map(|want| want.parse().unwrap()), "{first} {own}");
        }
    }

    fn compiled(tunnel: &str, node: &NodeFacts) -> Result<(Ruleset, Vec<&'static str>), Vec<&'static str>> {
        let guard = "[{name: web, pods: {cidrs: [10.244.0.0/16], ports: [8443]}, allow: [tunnel: {}]}]";
        let text = format!(
            "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: t}}\nspec: {{mode: Enforce, guard: {guard}, tunnel: {tunnel}}}\n"
        );
        let ids = |found: &[Diagnostic], severity| {
            found.iter().filter(|finding| finding.severity == severity).map(|finding| finding.id).collect()
        };
        compile(&Source { path: "t".into(), text }, node)
            .map(|(ruleset, warnings)| (ruleset, ids(&warnings, Severity::Warning)))
            .map_err(|errors| ids(&errors, Severity::Error))
    }

    fn in_cluster() -> NodeFacts {
        NodeFacts { addresses: vec![ip("10.0.0.7")], service_host: Some(ip("10.96.0.1")), ..NodeFacts::default() }
    }

    #[test]
    fn what_cannot_be_meant_is_an_error_and_what_will_not_work_a_warning() {
        for (tunnel, id) in [
            ("{dial: [services: {ports: [443]}]}", "NG020"),
            ("{dial: [], serviceCidrs: []}", "NG007"),
            ("{dial: [], serviceCidrs: [10.96.0.1/16]}", "NG007"),
            ("{dial: [pods: {cidrs: [10.96.7.0/24], ports: [443]}], serviceCidrs: [10.96.0.0/16]}", "NG021"),
            (
                "{dial: [{services: {ports: [443]}, pods: {cidrs: [10.0.0.0/8], ports: [1]}}], serviceCidrs: [10.96.0.0/16]}",
                "NG012",
            ),
            ("{dial: [services: {ports: [443], protocol: UDP}], serviceCidrs: [10.96.0.0/16]}", "NG015"),
            ("{dial: [services: {ports: []}], serviceCidrs: [10.96.0.0/16]}", "NG006"),
            ("{dial: [{services: {ports: [443]}, certificate: {ca: /a}}], serviceCidrs: [10.96.0.0/16]}", "NG031"),
        ] {
            assert_eq!(compiled(tunnel, &in_cluster()).unwrap_err(), [id], "{tunnel}");
        }
        let (_, warnings) =
            compiled("{dial: [services: {ports: [443]}], serviceCidrs: [10.96.0.0/16]}", &in_cluster()).unwrap();
        assert_eq!(warnings, ["NG106"]);
    }

    #[test]
    fn a_cluster_ip_is_never_admitted_as_a_pod() {
        let judge = |tunnel: &str, node: &NodeFacts, address: &str| {
            let (ruleset, _) = compiled(tunnel, node).unwrap();
            authorize(Some(&ruleset), node, address.parse().unwrap()).map(|permit| permit.rule().to_owned())
        };
        let outside = NodeFacts { service_host: None, ..in_cluster() };
        let wide = "pods: {cidrs: [10.0.0.0/8], ports: [443, 8443]}";
        let declared = format!("{{dial: [{wide}], serviceCidrs: [10.96.0.0/16]}}");
        let named = format!("{{dial: [{wide}, services: {{ports: [443]}}], serviceCidrs: [10.96.0.0/16]}}");
        let silent = format!("{{dial: [{wide}]}}");
        let nothing = "{dial: [node: {ports: [10250, 443]}, pods: {cidrs: [10.244.1.0/24], ports: [8443]}]}";
        let narrow = "{dial: [pods: {cidrs: [10.100.1.0/24], ports: [443]}]}";
        for (tunnel, node, address, want) in [
            (declared.as_str(), &outside, "10.96.3.4:443", Err(Refusal::ServiceAddress)),
            (&declared, &outside, "10.244.1.2:8443", Ok("tunnel.dial[0]")),
            (&named, &outside, "10.96.3.4:443", Ok("tunnel.dial[1]")),
            (&named, &outside, "10.96.3.4:8443", Err(Refusal::PortNotNamed)),
            (&named, &outside, "[::ffff:10.96.3.4]:443", Ok("tunnel.dial[1]")),
            // What kubelet tells every pod is enough to cut Services out of a prefix that holds them.
            (&silent, &in_cluster(), "10.96.3.4:443", Err(Refusal::ServiceAddress)),
            (&silent, &in_cluster(), "10.244.1.2:443", Ok("tunnel.dial[0]")),
            (&silent, &outside, "10.96.3.4:443", Ok("tunnel.dial[0]")),
            (&declared, &in_cluster(), "10.97.3.4:443", Ok("tunnel.dial[0]")),
            // A prefix that holds no Service is taken at its word, although the guess is wide.
            (narrow, &in_cluster(), "10.100.1.2:443", Ok("tunnel.dial[0]")),
            (narrow, &in_cluster(), "10.100.2.2:443", Err(Refusal::ServiceAddress)),
            (nothing, &in_cluster(), "10.96.3.4:8443", Err(Refusal::ServiceAddress)),
            // A guess does not outdo what a port says.
            (nothing, &in_cluster(), "10.96.3.4:10250", Err(Refusal::AnotherNode)),
            (nothing, &in_cluster(), "10.0.0.8:10250", Err(Refusal::AnotherNode)),
            (nothing, &outside, "10.96.3.4:8443", Err(Refusal::AddressNotNamed)),
        ] {
            let verdict = judge(tunnel, node, address);
            assert_eq!(verdict, want.map(str::to_owned), "{tunnel} {address}");
        }
    }

    proptest! {
        #[test]
        fn a_declared_service_address_is_admitted_by_services_alone(host in any::<u16>(), port in 440u16..446, services in any::<bool>()) {
            let entry = if services { ", services: {ports: [443]}" } else { "" };
            let tunnel = format!("{{dial: [pods: {{cidrs: [0.0.0.0/0, 10.0.0.0/8], ports: [1-65535]}}{entry}], serviceCidrs: [10.96.0.0/16]}}");
            let (ruleset, _) = compiled(&tunnel, &in_cluster()).unwrap();
            let [third, fourth] = host.to_be_bytes();
            let verdict = authorize(Some(&ruleset), &in_cluster(), ([10, 96, third, fourth], port).into());
            prop_assert_eq!(verdict.is_ok(), services && port == 443);
        }

        #[test]
        fn a_guess_is_within_what_kubernetes_takes_and_never_the_nodes(first in any::<[u8; 4]>(), own in any::<[u8; 4]>()) {
            if let Some(GuessedRange { first, range }) = guess(first.into(), &[own.into()]) {
                prop_assert!(range.contains(&first) && !range.contains(&IpAddr::from(own)));
                prop_assert!((12..=24).contains(&range.prefix_len()) && range.trunc() == range);
                prop_assert_eq!(range.hosts().next(), Some(first));
            }
        }
    }
}
