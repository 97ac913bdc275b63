//! Owns the step from a document to a ruleset: a pure function, all or nothing.
//! Called by `watch` and `check`.
//! Must never return a ruleset together with an error, and never one that the kernel's tables cannot hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use guard_common::abi::{MAX_PEERS, MAX_PORTS, MAX_RULES, MAX_SCOPES};
use ipnet::IpNet;

use super::{
    diagnostic::{Diagnostic, Severity, Source},
    document::{Dial, Document, Guard, NodePorts, PodPorts, Selector, decode, span},
    peers::{Block, peers},
    ruleset::{DialRule, DialTarget, GuardedPort, Mode, NODE_SCOPE, PortRule, Rule, Ruleset, Tables},
    values::{Findings, join, port_text},
};
use crate::node::NodeFacts;

/// `apiVersion`.
pub const API_VERSION: &str = "nodeguard.dev/v1alpha1";
/// `kind`.
pub const KIND: &str = "NodeGuardPolicy";

/// A rule with every value read.
struct Read {
    name: String,
    mode: Mode,
    node: Vec<RangeInclusive<u16>>,
    cidrs: Vec<IpNet>,
    pods: Vec<RangeInclusive<u16>>,
    protocol: u8,
    tunnel: bool,
    from_node: bool,
    blocks: Vec<Block>,
}

/// Compiles a document for this node. With the ruleset come its warnings; without it, at least one error.
pub fn compile(source: &Source, node: &NodeFacts) -> Result<(Ruleset, Vec<Diagnostic>), Vec<Diagnostic>> {
    let document = decode(source)?;
    let mut findings = Findings::default();
    check_head(&document, &mut findings);
    let mode = findings.mode(&document.spec.mode);
    let name = findings.name(&document.metadata.name);
    let mut names = BTreeMap::new();
    let mut rules = Vec::new();
    for (index, guard) in document.spec.guard.iter().enumerate() {
        let rule = read_rule(index, guard, mode, &mut findings);
        if let Some(first) = names.insert(rule.name.clone(), span(&guard.name)) {
            let (line, _) = source.position(first.start);
            findings.add(Diagnostic::error(
                "NG010",
                span(&guard.name),
                format!("two rules are named `{}`", rule.name),
                format!("the other one is on line {line}"),
            ));
        }
        rules.push(rule);
    }
    let dial: Vec<DialRule> = document
        .spec
        .tunnel
        .dial
        .iter()
        .enumerate()
        .filter_map(|(index, dial)| read_dial(index, dial, &mut findings))
        .collect();

    // Tables of a document that is rejected anyway would only repeat its errors.
    let broken = |findings: &Findings| findings.0.iter().any(|finding| finding.severity == Severity::Error);
    if broken(&findings) {
        return Err(findings.0);
    }
    let tables = tables(&rules, node);
    let place = span(&document.kind);
    for (what, have, most) in sizes(&rules, &tables) {
        if have > most {
            findings.add(
                Diagnostic::error(
                    "NG014",
                    place.clone(),
                    format!("the policy has {have} {what}, more than the {most} that the kernel's tables hold"),
                    "the whole document",
                )
                .help("nothing was changed; join prefixes or ports, or split the policy by node"),
            );
        }
    }
    warn(&document, &rules, &mut findings);
    if broken(&findings) {
        return Err(findings.0);
    }
    let rules = rules
        .iter()
        .map(|rule| Rule { name: rule.name.clone(), mode: rule.mode, guards: guards(rule), allows: allows(rule) })
        .collect();
    Ok((Ruleset { name, digest: digest(&source.text), mode, rules, tables, dial }, findings.0))
}

fn check_head(document: &Document, findings: &mut Findings) {
    for (text, want, field) in [(&document.api_version, API_VERSION, "apiVersion"), (&document.kind, KIND, "kind")] {
        if text.value != want {
            findings.add(Diagnostic::error(
                "NG004",
                span(text),
                format!("{field} `{}` is not known", text.value),
                format!("`{want}`"),
            ));
        }
    }
}

fn read_rule(index: usize, guard: &Guard, whole: Mode, findings: &mut Findings) -> Read {
    let own = guard.mode.as_ref().map_or(Mode::Enforce, |mode| findings.mode(mode));
    let mut rule = Read {
        name: findings.name(&guard.name),
        mode: if whole == Mode::Audit { Mode::Audit } else { own },
        node: Vec::new(),
        cidrs: Vec::new(),
        pods: Vec::new(),
        protocol: 6,
        tunnel: false,
        from_node: false,
        blocks: Vec::new(),
    };
    match (&guard.node, &guard.pods) {
        (Some(NodePorts { ports, protocol }), None) => {
            rule.node = findings.ports(ports);
            rule.protocol = findings.protocol(protocol.as_ref());
        }
        (None, Some(pods)) => {
            (rule.cidrs, rule.pods) = (findings.cidrs(pods), findings.ports(&pods.ports));
            rule.protocol = findings.protocol(pods.protocol.as_ref());
        }
        (Some(_), Some(_)) | (None, None) => {
            findings.add(
                Diagnostic::error(
                    "NG012",
                    span(&guard.name),
                    format!("rule `{}` must guard either `node` or `pods`", rule.name),
                    "exactly one of `node: {ports: [...]}` and `pods: {cidrs: [...], ports: [...]}`",
                )
                .help("write two rules to guard ports of both"),
            );
        }
    }
    if guard.allow.value.is_empty() {
        findings.add(Diagnostic::warning(
            "NG101",
            span(&guard.allow),
            format!("rule `{}` admits nobody", rule.name),
            "an empty list is nobody, not everybody",
        ));
    }
    for selector in &guard.allow.value {
        read_selector(index, selector, &guard.name, &mut rule, findings);
    }
    rule
}

fn read_selector(
    index: usize,
    selector: &Selector,
    name: &serde_saphyr::Spanned<String>,
    rule: &mut Read,
    findings: &mut Findings,
) {
    let places: Vec<_> =
        [selector.tunnel.as_ref().map(span), selector.node.as_ref().map(span), selector.ip_block.as_ref().map(span)]
            .into_iter()
            .flatten()
            .collect();
    if places.len() != 1 {
        let place = places.iter().cloned().reduce(|first, second| join(&first, &second)).unwrap_or_else(|| span(name));
        findings.add(Diagnostic::error(
            "NG009",
            place,
            format!("an entry of `allow` of rule `{}` must be exactly one selector", name.value),
            "`tunnel: {}`, `node: {}` or `ipBlock: {cidr: ...}`",
        ));
        return;
    }
    rule.tunnel |= selector.tunnel.is_some();
    rule.from_node |= selector.node.is_some();
    let Some(block) = selector.ip_block.as_ref().map(|block| &block.value) else { return };
    let Some(cidr) = findings.cidr(&block.cidr) else { return };
    if cidr.prefix_len() == 0 {
        let family = if matches!(cidr, IpNet::V4(_)) { "IPv4" } else { "IPv6" };
        findings.add(Diagnostic::warning(
            "NG103",
            span(&block.cidr),
            format!("`{cidr}` admits every {family} address"),
            "the port is guarded against nobody here",
        ));
    }
    let mut except = Vec::new();
    for text in &block.except {
        let Some(net) = findings.cidr(text) else { continue };
        if net == cidr || !cidr.contains(&net) {
            findings.add(Diagnostic::error(
                "NG008",
                span(text),
                format!("`{net}` does not lie inside `{cidr}`"),
                "an exception is a smaller part of its block",
            ));
        }
        except.push(net);
    }
    rule.blocks.push(Block { rule: index, cidr, except });
}

fn read_dial(index: usize, dial: &Dial, findings: &mut Findings) -> Option<DialRule> {
    let name = format!("tunnel.dial[{index}]");
    let (target, ports) = match (&dial.node, &dial.pods) {
        (Some(node), None) => {
            findings.protocol(node.value.protocol.as_ref());
            (DialTarget::Node, findings.ports(&node.value.ports))
        }
        (None, Some(pods)) => {
            let PodPorts { ports, protocol, .. } = &pods.value;
            findings.protocol(protocol.as_ref());
            (DialTarget::Pods(findings.cidrs(&pods.value)), findings.ports(ports))
        }
        (node, pods) => {
            let places = [node.as_ref().map(span), pods.as_ref().map(span)];
            let place = places.into_iter().flatten().reduce(|first, second| join(&first, &second)).unwrap_or(0..0);
            findings.add(Diagnostic::error(
                "NG012",
                place,
                format!("`{name}` must name either `node` or `pods`"),
                "exactly one of `node: {ports: [...]}` and `pods: {cidrs: [...], ports: [...]}`",
            ));
            return None;
        }
    };
    Some(DialRule { name, target, ports })
}

/// The kernel's tables: every port of every scope with the union of what its rules allow.
fn tables(rules: &[Read], node: &NodeFacts) -> Tables {
    let mut tables = Tables::default();
    let mut lists: BTreeMap<Vec<usize>, u32> = BTreeMap::new();
    let mut add = |tables: &mut Tables, scope: u32, of_scope: &[usize], pods: bool| {
        let mut by_port: BTreeMap<(u8, u16), Vec<usize>> = BTreeMap::new();
        for (index, rule) in of_scope.iter().filter_map(|index| rules.get(*index).map(|rule| (*index, rule))) {
            for port in if pods { &rule.pods } else { &rule.node }.iter().cloned().flatten() {
                let rules = by_port.entry((rule.protocol, port)).or_default();
                if rules.last() != Some(&index) {
                    rules.push(index);
                }
            }
        }
        for ((protocol, port), guarding) in by_port {
            let number = lists.len() as u32;
            let list = *lists.entry(guarding.clone()).or_insert(number);
            let first = |allows: fn(&Read) -> bool| {
                guarding.iter().copied().find(|index| rules.get(*index).is_some_and(allows))
            };
            let rule = PortRule {
                list,
                rule: guarding.first().copied().unwrap_or_default(),
                tunnel: first(|rule| rule.tunnel),
                node: first(|rule| rule.from_node),
                audit: first(|rule| rule.mode == Mode::Enforce).is_none(),
            };
            tables.ports.insert(GuardedPort { scope, protocol, port }, rule);
        }
    };
    let all: Vec<usize> = (0..rules.len()).collect();
    add(&mut tables, NODE_SCOPE, &all, false);
    // A pod's address belongs to its longest prefix, which therefore carries the rules of every prefix around it.
    let mut scopes: BTreeMap<Vec<usize>, u32> = BTreeMap::new();
    for cidr in rules.iter().flat_map(|rule| &rule.cidrs).copied().collect::<BTreeSet<IpNet>>() {
        let around = |rule: &Read| rule.cidrs.iter().any(|outer| outer.contains(&cidr));
        let of_scope: Vec<usize> = all.iter().copied().filter(|index| rules.get(*index).is_some_and(around)).collect();
        let next = NODE_SCOPE + 1 + scopes.len() as u32;
        let scope = *scopes.entry(of_scope).or_insert(next);
        tables.scopes.insert(cidr, scope);
    }
    for (of_scope, scope) in &scopes {
        add(&mut tables, *scope, of_scope, true);
    }
    for address in &node.addresses {
        tables.scopes.insert(IpNet::from(*address), NODE_SCOPE);
    }
    for (guarding, list) in &lists {
        let blocks: Vec<Block> = guarding
            .iter()
            .filter_map(|index| rules.get(*index))
            .flat_map(|rule| rule.blocks.iter().cloned())
            .collect();
        tables.peers.extend(peers(&blocks).into_iter().map(|(net, peer)| ((*list, net), peer)));
    }
    tables
}

/// What there is of each kind, and how much of it one generation of the kernel's tables can hold: half of each.
fn sizes(rules: &[Read], tables: &Tables) -> [(&'static str, usize, usize); 5] {
    let v4 = tables.peers.keys().filter(|(_, net)| matches!(net, IpNet::V4(_))).count();
    [
        ("rules", rules.len(), MAX_RULES as usize),
        ("guarded ports", tables.ports.len(), MAX_PORTS as usize / 2),
        ("pod prefixes and node addresses", tables.scopes.len(), MAX_SCOPES as usize / 2),
        ("IPv4 peer prefixes", v4, MAX_PEERS as usize / 2),
        ("IPv6 peer prefixes", tables.peers.len() - v4, MAX_PEERS as usize / 2),
    ]
}

/// What is allowed and does not fit together.
fn warn(document: &Document, rules: &[Read], findings: &mut Findings) {
    let mut check = |ports: &serde_saphyr::Spanned<Vec<serde_saphyr::Spanned<String>>>,
                     guarded: &dyn Fn(&Read) -> &[RangeInclusive<u16>]| {
        for text in &ports.value {
            let Some((first, last)) = text
                .value
                .split_once('-')
                .or(Some((&text.value, &text.value)))
                .and_then(|(first, last)| Some((first.parse::<u16>().ok()?, last.parse::<u16>().ok()?)))
            else {
                continue;
            };
            let meets =
                |rule: &&Read| guarded(rule).iter().any(|range| *range.start() <= last && first <= *range.end());
            let guarding: Vec<&Read> = rules.iter().filter(meets).collect();
            if let Some(rule) = guarding.first().filter(|_| guarding.iter().all(|rule| !rule.tunnel)) {
                let message = format!("dials to port {} will be refused by the kernel", text.value);
                findings.add(Diagnostic::warning(
                    "NG102",
                    span(text),
                    message,
                    format!("rule `{}` guards it and does not allow `tunnel`", rule.name),
                ));
            }
        }
    };
    for dial in &document.spec.tunnel.dial {
        if let Some(node) = &dial.node {
            check(&node.value.ports, &|rule| &rule.node);
        }
        if let Some(pods) = &dial.pods {
            check(&pods.value.ports, &|rule| &rule.pods);
        }
    }
}

fn guards(rule: &Read) -> String {
    if rule.cidrs.is_empty() {
        return format!("node {}", port_text(&rule.node));
    }
    format!("pods {} {}", rule.cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(","), port_text(&rule.pods))
}

fn allows(rule: &Read) -> String {
    let mut allows: Vec<String> = Vec::new();
    allows.extend(rule.tunnel.then(|| "tunnel".to_owned()));
    allows.extend(rule.from_node.then(|| "node".to_owned()));
    for block in rule.blocks.iter().take(4) {
        let except: Vec<String> = block.except.iter().map(IpNet::to_string).collect();
        allows.push(if except.is_empty() {
            block.cidr.to_string()
        } else {
            format!("{} except {}", block.cidr, except.join(" "))
        });
    }
    if rule.blocks.len() > 4 {
        allows.push(format!("{} more blocks", rule.blocks.len() - 4));
    }
    if allows.is_empty() { "nobody".to_owned() } else { allows.join(", ") }
}

fn digest(text: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
