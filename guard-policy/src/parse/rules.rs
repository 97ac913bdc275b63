//! Owns parsing the parts of a document: it checks every value and reports all mistakes at once.
//! Called by `compile`.
//! Must never stop at the first mistake, or turn a mistake into a value.

use guard_common::packet::{TCP, UDP};
use ipnet::IpNet;

use crate::{
    diagnostic::Diagnostic,
    document,
    document::{DialSpec, Document, GuardSpec, NodePorts, PodPorts, Selector, span},
    node_facts::NodeFacts,
    parse::{
        checked::{Companion, CompanionServer, ControlPlane, GuardRule, PeerBlock},
        last_hop,
        scalars::{Findings, join},
        service_range::{check_pods, parse_services},
        unheard,
    },
    ruleset::{DialDemands, DialRule, DialTarget, Mode, ServiceRange},
};

const POD_CIDRS: &str = "to show the pod CIDR of this node, run `kubectl get node NAME -o jsonpath={.spec.podCIDRs}`";

pub(crate) fn parse_rule(index: usize, guard: &GuardSpec, whole: Mode, findings: &mut Findings) -> GuardRule {
    let own = guard.mode.as_ref().map_or(Mode::Enforce, |mode| findings.mode(mode));
    let mut rule = GuardRule {
        name: findings.name(&guard.name),
        mode: if whole == Mode::Audit { Mode::Audit } else { own },
        node: Vec::new(),
        pods: Vec::new(),
        cidrs: Vec::new(),
        pods_cgroup: None,
        protocol: TCP,
        tunnel: false,
        from_node: false,
        callers: Vec::new(),
        blocks: Vec::new(),
    };
    match (&guard.node, &guard.pods) {
        (Some(node @ NodePorts { ports, protocol }), None) => {
            rule.node = findings.ports(ports);
            rule.protocol = findings.protocol(protocol.as_ref());
            unheard::check(node, &rule.node, rule.protocol, findings);
        }
        (None, Some(pods)) => {
            rule.pods = findings.ports(&pods.ports);
            match (&pods.cidrs, &pods.cgroup) {
                (Some(cidrs), None) => rule.cidrs = findings.cidrs(cidrs, POD_CIDRS),
                (None, cgroup) => rule.pods_cgroup = cgroup.as_ref().and_then(|cgroup| findings.cgroup(cgroup)),
                (Some(_), Some(cgroup)) => findings.add(Diagnostic::error(
                    "NG012",
                    span(cgroup),
                    format!("rule `{}` names pods by both `cidrs` and `cgroup`", rule.name),
                    "remove one of the two",
                )),
            }
            rule.protocol = findings.protocol(pods.protocol.as_ref());
        }
        (Some(_), Some(_)) | (None, None) => {
            findings.add(
                Diagnostic::error(
                    "NG012",
                    span(&guard.name),
                    format!("rule `{}` must have exactly one of `node` and `pods`", rule.name),
                    "write `node: {ports: [...]}` or `pods: {cidrs: [...], ports: [...]}`",
                )
                .help("to guard ports of both, write two rules"),
            );
        }
    }
    if guard.allow.value.is_empty() {
        findings.add(Diagnostic::warning(
            "NG101",
            span(&guard.allow),
            format!("rule `{}` admits nobody", rule.name),
            "an empty list allows nobody",
        ));
    }
    for selector in &guard.allow.value {
        parse_selector(index, selector, &guard.name, &mut rule, findings);
    }
    rule
}

fn parse_selector(
    index: usize,
    selector: &Selector,
    name: &serde_saphyr::Spanned<String>,
    rule: &mut GuardRule,
    findings: &mut Findings,
) {
    let places: Vec<_> = [
        selector.tunnel.as_ref().map(span),
        selector.node.as_ref().map(span),
        selector.caller.as_ref().map(span),
        selector.ip_block.as_ref().map(span),
    ]
    .into_iter()
    .flatten()
    .collect();
    if places.len() != 1 {
        let place = places.iter().cloned().reduce(|first, second| join(&first, &second)).unwrap_or_else(|| span(name));
        findings.add(Diagnostic::error(
            "NG009",
            place,
            format!("an entry of `allow` in rule `{}` must have exactly one selector", name.value),
            "write `tunnel: {}`, `node: {}`, `caller: {cgroup: ...}` or `ipBlock: {cidr: ...}`",
        ));
        return;
    }
    if let Some(tunnel) = selector.tunnel.as_ref().filter(|_| rule.protocol == UDP) {
        findings.add(Diagnostic::error(
            "NG015",
            span(tunnel),
            format!("rule `{}` guards UDP ports, but the tunnel carries only TCP", name.value),
            "remove this selector",
        ));
    }
    rule.tunnel |= selector.tunnel.is_some();
    rule.from_node |= selector.node.is_some();
    rule.callers.extend(selector.caller.as_ref().and_then(|caller| findings.cgroup(&caller.value.cgroup)));
    let Some(block) = selector.ip_block.as_ref().map(|block| &block.value) else { return };
    let Some(cidr) = findings.cidr(&block.cidr) else { return };
    if cidr.prefix_len() == 0 {
        let family = if matches!(cidr, IpNet::V4(_)) { "IPv4" } else { "IPv6" };
        findings.add(Diagnostic::warning(
            "NG103",
            span(&block.cidr),
            format!("`{cidr}` admits every {family} address"),
            "no source address of this family is denied",
        ));
    }
    let mut except = Vec::new();
    for text in &block.except {
        let Some(net) = findings.cidr(text) else { continue };
        if net == cidr || !cidr.contains(&net) {
            findings.add(Diagnostic::error(
                "NG008",
                span(text),
                format!("`{net}` is not a smaller part of `{cidr}`"),
                "an exception must lie inside its block and be smaller",
            ));
        }
        except.push(net);
    }
    rule.blocks.push(PeerBlock { rule: index, cidr, except });
}

pub(crate) fn parse_dial(
    index: usize,
    dial: &DialSpec,
    range: &ServiceRange,
    findings: &mut Findings,
) -> Option<DialRule> {
    let name = format!("tunnel.dial[{index}]");
    let (target, ports) = match (&dial.node, &dial.pods, &dial.services) {
        (Some(node), None, None) => {
            findings.only_tcp(node.value.protocol.as_ref());
            (DialTarget::Node, findings.ports(&node.value.ports))
        }
        (None, None, Some(services)) => parse_services(&name, services, range, findings),
        (None, Some(pods), None) => {
            let PodPorts { cidrs, cgroup, ports, protocol } = &pods.value;
            findings.only_tcp(protocol.as_ref());
            let Some(cidrs) = cidrs.as_ref().filter(|_| cgroup.is_none()) else {
                findings.add(
                    Diagnostic::error(
                        "NG007",
                        span(pods),
                        format!("`pods` of `{name}` must have `cidrs` and no `cgroup`"),
                        "write `cidrs: [...]`",
                    )
                    .help("a dial is judged by its address, before any cgroup is known"),
                );
                return None;
            };
            let cidrs = findings.cidrs(cidrs, POD_CIDRS);
            check_pods(&cidrs, pods, range, findings);
            (DialTarget::Pods(cidrs), findings.ports(ports))
        }
        (node, pods, services) => {
            let places = [node.as_ref().map(span), pods.as_ref().map(span), services.as_ref().map(span)];
            let place = places.into_iter().flatten().reduce(|first, second| join(&first, &second)).unwrap_or(0..0);
            findings.add(Diagnostic::error(
                "NG012",
                place,
                format!("`{name}` must have exactly one of `node`, `pods` and `services`"),
                "write `node: {ports: [...]}`, `pods: {cidrs: [...], ports: [...]}` or `services: {ports: [...]}`",
            ));
            return None;
        }
    };
    let tls = dial.tls.as_ref().is_some_and(|tls| last_hop::tls(tls, findings));
    let certificate =
        dial.certificate.as_ref().and_then(|certificate| last_hop::certificate(certificate, &target, findings));
    Some(DialRule {
        name,
        target,
        ports,
        demands: DialDemands { tls, certificates: certificate.into_iter().collect() },
    })
}

pub(crate) fn parse_companion(companion: &document::CompanionSpec, findings: &mut Findings) -> Option<Companion> {
    let cgroup = findings.cgroup(&companion.cgroup);
    if companion.servers.value.is_empty() {
        findings.add(Diagnostic::error(
            "NG017",
            span(&companion.servers),
            "`companion` has no `servers`, so it could not reach its proxy-server",
            "add an entry, as in `{cidr: 10.0.0.5/32, ports: [8132]}`",
        ));
    }
    let mut servers = Vec::new();
    for server in &companion.servers.value {
        let protocol = findings.protocol(server.protocol.as_ref());
        let (cidr, ports) = (findings.cidr(&server.cidr), findings.ports(&server.ports));
        servers.extend(cidr.map(|cidr| CompanionServer { cidr, protocol, ports }));
    }
    Some(Companion { cgroup: cgroup?, servers })
}

pub(crate) fn parse_control_plane(
    hub: &document::ControlPlaneSpec,
    node: &NodeFacts,
    findings: &mut Findings,
) -> ControlPlane {
    const HELP: &str = "to show the addresses of the API servers, run `kubectl get endpoints kubernetes`";
    let addresses = findings.cidrs(&hub.addresses, HELP);
    for (text, cidr) in hub.addresses.value.iter().zip(&addresses) {
        if let Some(own) = node.addresses.iter().find(|own| cidr.contains(*own)) {
            findings.add(Diagnostic::warning(
                "NG104",
                span(text),
                format!("`{cidr}` contains {own}, an address of this node"),
                "processes of this node will reach only these ports of it",
            ));
        }
    }
    ControlPlane { addresses, ports: findings.ports(&hub.ports) }
}

/// All pods are in one cgroup, so the rules that name it must agree.
pub(crate) fn check_pods_cgroups(document: &Document, rules: &[GuardRule], findings: &mut Findings) {
    let mut named = rules.iter().zip(&document.spec.guard).filter(|(rule, _)| rule.all_pods());
    let Some((first, _)) = named.next() else { return };
    for (rule, guard) in named.filter(|(rule, _)| rule.pods_cgroup != first.pods_cgroup) {
        findings.add(Diagnostic::error(
            "NG018",
            span(&guard.name),
            format!("rules `{}` and `{}` name different cgroups for pods", first.name, rule.name),
            "write the same `cgroup` in both rules, or in neither",
        ));
    }
}
