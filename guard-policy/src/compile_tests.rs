//! Owns the tests of `compile`: what a document means, packet by packet, and how broken ones are told.

use std::net::IpAddr;

use proptest::prelude::*;

use crate::{
    compile::*,
    ruleset::{ALL_PODS_SCOPE, GuardedPort, NODE_SCOPE, OTHER_PODS_SCOPE, Peer, PeerKind},
};

const GOOD: &str = include_str!("../../deploy/policies/worker.yaml");

fn source(text: &str) -> Source {
    Source { path: "policy.yaml".into(), text: text.to_owned() }
}

fn good(text: &str) -> Ruleset {
    let source = source(text);
    let compiled =
        compile(&source, &NodeFacts { addresses: vec!["10.0.0.7".parse().unwrap()], ..NodeFacts::default() });
    compiled.unwrap_or_else(|diagnostics| panic!("{}", source.render(&diagnostics, false))).0
}

fn ids(text: &str) -> Vec<&'static str> {
    match compile(&source(text), &NodeFacts::default()) {
        Ok((_, warnings)) => warnings.iter().map(|finding| finding.id).collect(),
        Err(diagnostics) => diagnostics.iter().map(|finding| finding.id).collect(),
    }
}

/// A document around these rules and dials.
fn document(guard: &str, dial: &str) -> String {
    format!(
        "apiVersion: {API_VERSION}\nkind: {KIND}\nmetadata: {{name: t}}\nspec:\n  mode: Enforce\n  guard: {guard}\n  tunnel: {{dial: {dial}}}\n"
    )
}

#[test]
fn the_sample_policy_means_what_it_says() {
    let ruleset = good(GOOD);
    assert_eq!(ruleset.name, "worker");
    let kubelet = ruleset.tables.ports[&GuardedPort { scope: NODE_SCOPE, protocol: 6, port: 10250 }];
    assert!(kubelet.tunnel.is_some() && !kubelet.audit);
    assert_eq!(ruleset.tables.scopes[&"10.0.0.7/32".parse::<IpNet>().unwrap()], NODE_SCOPE);
    assert!(ruleset.dial[0].has_port(10250));
}

#[test]
fn every_mistake_has_its_own_id() {
    let rule = |text: &str| document(&format!("[{text}]"), "[]");
    let cases = [
        (GOOD.replace("v1alpha1", "v2"), "NG004"),
        (GOOD.replace("mode: Enforce", "mode: enforce"), "NG005"),
        (format!("{GOOD}  edge: {{interfaces: []}}\n"), "NG019"),
        (format!("{GOOD}  edge: {{interfaces: [eth0, eth/1]}}\n"), "NG019"),
        (format!("{}  edge: {{interfaces: [eth0]}}\n", GOOD.replace("mode: Enforce", "mode: Audit")), "NG105"),
        (rule("{name: a, node: {ports: [102500]}, allow: [tunnel: {}]}"), "NG006"),
        (rule("{name: a, node: {ports: [0]}, allow: [tunnel: {}]}"), "NG006"),
        (rule("{name: a, node: {ports: [90-80]}, allow: [tunnel: {}]}"), "NG006"),
        (rule("{name: a, node: {ports: []}, allow: [tunnel: {}]}"), "NG006"),
        (rule("{name: a, node: {ports: [1]}, allow: [ipBlock: {cidr: 10.0.0.1}]}"), "NG007"),
        (rule("{name: a, node: {ports: [1]}, allow: [ipBlock: {cidr: 10.0.0.1/8}]}"), "NG007"),
        (rule("{name: a, node: {ports: [1]}, allow: [ipBlock: {cidr: '::ffff:10.0.0.0/104'}]}"), "NG007"),
        (rule("{name: a, pods: {cidrs: [], ports: [1]}, allow: [tunnel: {}]}"), "NG007"),
        (rule("{name: a, node: {ports: [1]}, allow: [ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/8]}]}"), "NG008"),
        (rule("{name: a, node: {ports: [1]}, allow: [ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}]}"), "NG008"),
        (rule("{name: a, node: {ports: [1]}, allow: [{tunnel: {}, node: {}}]}"), "NG009"),
        (rule("{name: a, node: {ports: [1]}, allow: [tunnel: ]}"), "NG009"),
        (rule("{name: a, node: {ports: [1]}, allow: []}, {name: a, node: {ports: [2]}, allow: []}"), "NG010"),
        (rule("{name: A_b, node: {ports: [1]}, allow: [tunnel: {}]}"), "NG011"),
        (rule("{name: a, allow: [tunnel: {}]}"), "NG012"),
        (document("[]", "[{}]"), "NG012"),
        (rule("{name: a, node: {ports: [1], protocol: SCTP}, allow: [tunnel: {}]}"), "NG015"),
        (rule("{name: a, node: {ports: [1], protocol: UDP}, allow: [tunnel: {}]}"), "NG015"),
        (document("[]", "[node: {ports: [1], protocol: UDP}]"), "NG015"),
        (document("[]", "[pods: {ports: [1]}]"), "NG007"),
        (rule("{name: a, pods: {cidrs: [10.0.0.0/8], cgroup: /k, ports: [1]}, allow: [tunnel: {}]}"), "NG012"),
        (rule("{name: a, node: {ports: [1]}, allow: [caller: {cgroup: kubelet.service}]}"), "NG016"),
        (rule("{name: a, node: {ports: [1]}, allow: [caller: {cgroup: /a/../b}]}"), "NG016"),
        (rule("{name: a, node: {ports: [1]}, allow: [caller: {cgroup: /}]}"), "NG016"),
        (document("[]", "[], companion: {cgroup: /a, servers: []}"), "NG017"),
        (document("[]", "[], companion: {cgroup: '', servers: [{cidr: 10.0.0.1/32, ports: [1]}]}"), "NG016"),
        (
            rule("{name: a, pods: {ports: [1]}, allow: []}, {name: b, pods: {cgroup: /k, ports: [2]}, allow: []}"),
            "NG018",
        ),
        (document("[]", "[]}\n  controlPlane: {addresses: [], ports: [6443]").replace("]}}", "]}"), "NG007"),
        (rule("{name: a, node: {ports: [1]}}"), "NG003"),
        (rule("{name: a, node: {ports: [1]}, allow: [], from: []}"), "NG003"),
        (GOOD.replace("  guard:", "  guards:"), "NG003"),
        (format!("{GOOD}---\n{GOOD}"), "NG002"),
        (GOOD.replace("  guard:", "   guard:"), "NG002"),
        (String::new(), "NG003"),
    ];
    for (text, id) in cases {
        let found = ids(&text);
        assert!(found.contains(&id), "{id} wanted, {found:?} found in\n{text}");
    }
}

#[test]
fn warnings_do_not_stop_a_document() {
    assert_eq!(ids(&document("[{name: a, node: {ports: [1]}, allow: []}]", "[]")), ["NG101"]);
    assert_eq!(ids(&document("[{name: a, node: {ports: [1]}, allow: [node: {}]}]", "[node: {ports: [1]}]")), ["NG102"]);
    assert_eq!(ids(&document("[{name: a, node: {ports: [1]}, allow: [ipBlock: {cidr: 0.0.0.0/0}]}]", "[]")), ["NG103"]);
    let node = |ports: &str| ids(&document(&format!("[{{name: a, node: {{{ports}}}, allow: [node: {{}}]}}]"), "[]"));
    for (ports, wanted) in [
        ("ports: [8472], protocol: UDP", &["NG107"][..]),
        ("ports: [51820-51830], protocol: UDP", &["NG107"]),
        ("ports: [30080]", &["NG108"]),
        ("ports: [30000-32767]", &["NG108"]),
        ("ports: [8472, 10250, 29999-30000, 1-65535]", &[]),
    ] {
        assert_eq!(node(ports), wanted, "{ports}");
    }
}

#[test]
fn more_than_the_kernel_holds_is_an_error_before_anything_changes() {
    let pods = |network: u32| {
        format!("{{name: p{network}, pods: {{cidrs: [10.{network}.0.0/16], ports: [1-65535]}}, allow: [tunnel: {{}}]}}")
    };
    assert_eq!(ids(&document(&format!("[{}, {}, {}]", pods(1), pods(2), pods(3)), "[]")), [""; 0]);
    let four = format!("[{}, {}, {}, {}]", pods(1), pods(2), pods(3), pods(4));
    assert_eq!(ids(&document(&four, "[]")), ["NG014"]);
}

#[test]
fn a_rule_only_audits_where_it_or_the_document_says_so() {
    let text = document(
        "[{name: a, mode: Audit, node: {ports: [1]}, allow: []}, {name: b, node: {ports: [2]}, allow: []}]",
        "[]",
    );
    let audits = |text: &str| good(text).tables.ports.values().map(|rule| rule.audit).collect::<Vec<_>>();
    assert_eq!(audits(&text), [true, false]);
    assert_eq!(audits(&text.replace("mode: Enforce", "mode: Audit")), [true, true]);
}

#[derive(Clone, Debug)]
struct RandomRule {
    all_pods: bool,
    udp: bool,
    caller: Option<&'static str>,
    cidrs: Vec<IpNet>,
    ports: Vec<RangeInclusive<u16>>,
    tunnel: bool,
    node: bool,
    blocks: Vec<IpNet>,
}

fn net() -> impl Strategy<Value = IpNet> {
    (0u8..16, 24u8..=32)
        .prop_map(|(last, length)| format!("10.0.0.{}/{length}", last * 16).parse::<IpNet>().unwrap().trunc())
}

fn random_rule() -> impl Strategy<Value = RandomRule> {
    let ports = prop::collection::vec((1u16..6, 0u16..3).prop_map(|(first, more)| first..=first + more), 1..3);
    let nets = || prop::collection::vec(net(), 0..3);
    let caller = prop::option::of(prop::sample::select(CALLERS.to_vec()));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (nets(), ports, flags, caller, nets()).prop_map(|(cidrs, ports, (tunnel, node, all_pods, udp), caller, blocks)| {
        let all_pods = all_pods && cidrs.is_empty();
        RandomRule { all_pods, udp, caller, cidrs, ports, tunnel: tunnel && !udp, node, blocks }
    })
}

/// One inside another, and one whose name only begins alike.
const CALLERS: [&str; 3] = ["/system.slice", "/system.slice/kubelet.service", "/system.slice2"];

fn yaml(rules: &[RandomRule]) -> String {
    let list = |nets: &[IpNet]| nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
    let rule = |(index, rule): (usize, &RandomRule)| {
        let ports =
            rule.ports.iter().map(|range| format!("{}-{}", range.start(), range.end())).collect::<Vec<_>>().join(", ");
        let protocol = if rule.udp { ", protocol: UDP" } else { "" };
        let target = if rule.all_pods {
            format!("pods: {{ports: [{ports}]{protocol}}}")
        } else if rule.cidrs.is_empty() {
            format!("node: {{ports: [{ports}]{protocol}}}")
        } else {
            format!("pods: {{cidrs: [{}], ports: [{ports}]{protocol}}}", list(&rule.cidrs))
        };
        let mut allow: Vec<String> = rule.blocks.iter().map(|net| format!("ipBlock: {{cidr: {net}}}")).collect();
        allow.extend(rule.tunnel.then(|| "tunnel: {}".to_owned()));
        allow.extend(rule.caller.map(|cgroup| format!("caller: {{cgroup: {cgroup}}}")));
        allow.extend(rule.node.then(|| "node: {}".to_owned()));
        format!("{{name: r{index}, {target}, allow: [{}]}}", allow.join(", "))
    };
    document(&format!("[{}]", rules.iter().enumerate().map(rule).collect::<Vec<_>>().join(", ")), "[]")
}

/// The scope that the kernel finds for a pod's address.
fn scope_of(tables: &RulesetTables, address: IpAddr) -> Option<u32> {
    tables
        .scopes
        .iter()
        .filter(|(net, _)| net.contains(&address))
        .max_by_key(|(net, _)| net.prefix_len())
        .map(|(_, scope)| *scope)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn the_tables_mean_what_the_rules_mean(rules in prop::collection::vec(random_rule(), 0..5)) {
        let tables = good(&yaml(&rules)).tables;
        for last in (0..=255u8).step_by(8) {
            let address = IpAddr::from([10, 0, 0, last]);
            for port in 1..9u16 {
                for (pod, udp) in [(false, false), (true, false), (false, true), (true, true)] {
                    // The node's own address is no pod's.
                    if pod && address == IpAddr::from([10, 0, 0, 7]) { continue; }
                    let whose = |rule: &RandomRule| match pod {
                        true => rule.all_pods || rule.cidrs.iter().any(|net| net.contains(&address)),
                        false => !rule.all_pods && rule.cidrs.is_empty(),
                    };
                    let guards = |rule: &&RandomRule| rule.udp == udp && rule.ports.iter().any(|range| range.contains(&port)) && whose(rule);
                    let guarding: Vec<&RandomRule> = rules.iter().filter(guards).collect();
                    let of_pod = scope_of(&tables, address).filter(|scope| *scope != NODE_SCOPE).unwrap_or(ALL_PODS_SCOPE);
                    let scope = if pod { of_pod } else { NODE_SCOPE };
                    let entry = tables.ports.get(&GuardedPort { scope, protocol: if udp { 17 } else { 6 }, port });
                    prop_assert_eq!(entry.is_some(), !guarding.is_empty());
                    let Some(entry) = entry else { continue };
                    prop_assert_eq!(entry.tunnel.is_some(), guarding.iter().any(|rule| rule.tunnel));
                    prop_assert_eq!(entry.node.is_some(), guarding.iter().any(|rule| rule.node));
                    prop_assert_eq!(entry.caller, guarding.iter().any(|rule| rule.caller.is_some()));
                    // A process in a named cgroup may do what every cgroup around it may.
                    for caller in CALLERS.iter().filter(|caller| tables.cgroups.contains_key(**caller)) {
                        let admitted = tables.callers.contains_key(&(entry.list, (*caller).to_owned()));
                        let around = |rule: &&RandomRule| rule.caller.is_some_and(|outer| *caller == outer || caller.starts_with(&format!("{outer}/")));
                        prop_assert_eq!(admitted, guarding.iter().any(around), "{}", caller);
                    }
                    let peer = tables.peers.iter().filter(|((list, net), _)| *list == entry.list && net.contains(&address)).max_by_key(|((_, net), _)| net.prefix_len());
                    let admitted = matches!(peer, Some((_, Peer { kind: PeerKind::Allow, .. })));
                    prop_assert_eq!(admitted, guarding.iter().any(|rule| rule.blocks.iter().any(|net| net.contains(&address))));
                    if !pod { continue; }
                    // What a pod that cannot be told admits, the rules of this one admit too, and what they let open may open.
                    let other = &tables.ports[&GuardedPort { scope: OTHER_PODS_SCOPE, protocol: if udp { 17 } else { 6 }, port }];
                    let enforced = !entry.audit;
                    prop_assert!(!enforced || !other.audit);
                    prop_assert!(!enforced || entry.tunnel.is_some() || other.tunnel.is_none());
                    prop_assert!(!enforced || entry.node.is_some() || other.node.is_none());
                    prop_assert!(!enforced || entry.caller || !other.caller);
                    prop_assert!(other.opens.tunnel || entry.tunnel.is_none());
                    prop_assert!(other.opens.node || entry.node.is_none());
                    prop_assert!(other.opens.caller || !entry.caller);
                    let peer = tables.peers.iter().filter(|((list, net), _)| *list == other.list && net.contains(&address)).max_by_key(|((_, net), _)| net.prefix_len());
                    let doubtful = matches!(peer, Some((_, Peer { kind: PeerKind::Allow, .. })));
                    prop_assert!(!enforced || admitted || !doubtful);
                }
            }
        }
    }

    #[test]
    fn no_text_makes_it_panic_and_every_error_has_a_place(text in "\\PC*", cut in 0usize..2000, more in ".{0,8}") {
        for text in [text, { let cut = cut.min(GOOD.len()); let cut = (0..=cut).rev().find(|at| GOOD.is_char_boundary(*at)).unwrap(); format!("{}{more}{}", &GOOD[..cut], &GOOD[cut..]) }] {
            if let Err(diagnostics) = compile(&source(&text), &NodeFacts::default()) {
                prop_assert!(diagnostics.iter().all(|finding| finding.span.is_some()));
                source(&text).render(&diagnostics, false);
            }
        }
    }
}
