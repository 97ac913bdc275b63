//! Owns the step from a document to a ruleset: a pure function, all or nothing.
//! Called by `policy_file`, and by `daemon/agent` for `--dial-anything`.
//! Must never return a ruleset together with an error, or a ruleset that does not fit into the kernel's tables.

use std::{collections::BTreeMap, ops::RangeInclusive};

use data_encoding::HEXLOWER;
use guard_common::{
    abi::{MAX_CALLERS, MAX_DESTINATIONS, MAX_PEERS, MAX_PORTS, MAX_RULES, MAX_SCOPES},
    packet::UDP,
};
use ipnet::IpNet;
use sha2::{Digest, Sha256};

use crate::{
    diagnostic::{Diagnostic, Severity, Source},
    document::{Document, decode, span},
    node_facts::NodeFacts,
    parse::{
        checked::{CheckedDocument, GuardRule},
        rules::{check_pods_cgroups, parse_companion, parse_control_plane, parse_dial, parse_rule},
        scalars::{Findings, port_text},
        service_range::{check_rules, parse_range},
        uplinks::parse_edge,
    },
    ruleset::{DialRule, Mode, RuleSummary, Ruleset, RulesetTables},
    tables::build::tables,
};

/// The value of `apiVersion` that this build accepts.
pub const API_VERSION: &str = "nodeguard.dev/v1alpha1";
/// The value of `kind` that this build accepts.
pub const KIND: &str = "NodeGuardPolicy";

/// Compiles a document for a node. Returns the ruleset with its warnings, or all findings, at least one of them an error.
///
/// The node's facts matter for the kernel's tables and for warnings: its own addresses, and the service range that is guessed from
/// `service_host`. The same document and the same facts always give the same ruleset.
pub fn compile(source: &Source, node: &NodeFacts) -> Result<(Ruleset, Vec<Diagnostic>), Vec<Diagnostic>> {
    let document = decode(source)?;
    let mut findings = Findings::default();
    check_head(&document, &mut findings);
    let mode = findings.mode(&document.spec.mode);
    let name = findings.name(&document.metadata.name);
    let mut names = BTreeMap::new();
    let mut rules = Vec::new();
    for (index, guard) in document.spec.guard.iter().enumerate() {
        let rule = parse_rule(index, guard, mode, &mut findings);
        if let Some(first) = names.insert(rule.name.clone(), span(&guard.name)) {
            let (line, _) = source.position(first.start);
            findings.add(Diagnostic::error(
                "NG010",
                span(&guard.name),
                format!("two rules are named `{}`", rule.name),
                format!("the first one is on line {line}"),
            ));
        }
        rules.push(rule);
    }
    let services = parse_range(&document.spec.tunnel, node, &mut findings);
    let dial: Vec<DialRule> = document
        .spec
        .tunnel
        .dial
        .iter()
        .enumerate()
        .filter_map(|(index, dial)| parse_dial(index, dial, &services, &mut findings))
        .collect();

    let companion =
        document.spec.tunnel.companion.as_ref().and_then(|companion| parse_companion(companion, &mut findings));
    let control_plane = document.spec.control_plane.as_ref().map(|hub| parse_control_plane(hub, node, &mut findings));
    let edge = document.spec.edge.as_ref().map(|edge| parse_edge(edge, &rules, &mut findings)).unwrap_or_default();
    check_pods_cgroups(&document, &rules, &mut findings);
    check_rules(&document, &rules, &mut findings);

    // The tables of a rejected document would only repeat its errors.
    let broken = |findings: &Findings| findings.0.iter().any(|finding| finding.severity == Severity::Error);
    if broken(&findings) {
        return Err(findings.0);
    }
    let audit = mode == Mode::Audit;
    let checked =
        CheckedDocument { rules: &rules, dial: &dial, services: &services, companion, control_plane, audit, edge };
    let tables = tables(&checked, node);
    let place = span(&document.kind);
    for (what, have, most) in sizes(&rules, &tables) {
        if have > most {
            findings.add(
                Diagnostic::error(
                    "NG014",
                    place.clone(),
                    format!("the policy has {have} {what}, but the kernel's tables hold at most {most}"),
                    "applies to the whole document",
                )
                .help("merge prefixes or ports, or write a smaller policy for each group of nodes"),
            );
        }
    }
    warn(&document, &rules, &mut findings);
    if broken(&findings) {
        return Err(findings.0);
    }
    let rules = rules
        .iter()
        .map(|rule| RuleSummary {
            name: rule.name.clone(),
            mode: rule.mode,
            guards: guards(rule),
            allows: allows(rule),
        })
        .collect();
    Ok((Ruleset { name, digest: digest(&source.text), mode, rules, tables, dial, services }, findings.0))
}

fn check_head(document: &Document, findings: &mut Findings) {
    for (text, want, field) in [(&document.api_version, API_VERSION, "apiVersion"), (&document.kind, KIND, "kind")] {
        if text.value != want {
            findings.add(Diagnostic::error(
                "NG004",
                span(text),
                format!("unsupported {field} `{}`", text.value),
                format!("must be `{want}`"),
            ));
        }
    }
}

/// For each kind of entry: its name, how many there are, and how many one generation can have. That is half of the kernel's table.
fn sizes(rules: &[GuardRule], tables: &RulesetTables) -> [(&'static str, usize, usize); 8] {
    let v4 = tables.peers.keys().filter(|(_, net)| matches!(net, IpNet::V4(_))).count();
    [
        ("rules", rules.len(), MAX_RULES as usize),
        ("guarded ports", tables.ports.len() + tables.destination_ports.len(), MAX_PORTS as usize / 2),
        ("callers in all rules together", tables.callers.len(), MAX_CALLERS as usize / 2),
        ("cgroups", tables.cgroups.len(), MAX_CALLERS as usize / 2),
        ("destination prefixes", tables.destinations.len(), MAX_DESTINATIONS as usize / 2),
        ("pod prefixes and node addresses", tables.scopes.len(), MAX_SCOPES as usize / 2),
        ("IPv4 peer prefixes", v4, MAX_PEERS as usize / 2),
        ("IPv6 peer prefixes", tables.peers.len() - v4, MAX_PEERS as usize / 2),
    ]
}

/// Warns about dials to a port whose rules do not allow `tunnel`.
fn warn(document: &Document, rules: &[GuardRule], findings: &mut Findings) {
    let mut check = |ports: &serde_saphyr::Spanned<Vec<serde_saphyr::Spanned<String>>>,
                     guarded: &dyn Fn(&GuardRule) -> &[RangeInclusive<u16>]| {
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
                |rule: &&GuardRule| guarded(rule).iter().any(|range| *range.start() <= last && first <= *range.end());
            let guarding: Vec<&GuardRule> = rules.iter().filter(meets).collect();
            if let Some(rule) = guarding.first().filter(|_| guarding.iter().all(|rule| !rule.tunnel)) {
                let message = format!("the kernel will deny dials to port {}", text.value);
                findings.add(Diagnostic::warning(
                    "NG102",
                    span(text),
                    message,
                    format!("rule `{}` guards this port and does not allow `tunnel`", rule.name),
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

fn guards(rule: &GuardRule) -> String {
    let (whose, ports) = if rule.pods.is_empty() {
        ("node".to_owned(), &rule.node)
    } else if rule.all_pods() {
        ("all pods".to_owned(), &rule.pods)
    } else {
        (format!("pods {}", rule.cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(",")), &rule.pods)
    };
    format!("{whose} {}{}", port_text(ports), if rule.protocol == UDP { "/UDP" } else { "" })
}

fn allows(rule: &GuardRule) -> String {
    let mut allows: Vec<String> = Vec::new();
    allows.extend(rule.tunnel.then(|| "tunnel".to_owned()));
    allows.extend(rule.from_node.then(|| "node".to_owned()));
    allows.extend(rule.callers.iter().map(|cgroup| format!("caller {cgroup}")));
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
    HEXLOWER.encode(&Sha256::digest(text))
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
