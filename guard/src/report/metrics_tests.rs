//! Owns the tests of the metrics: what a scrape says, and that the page in docs lists the same set.

use std::collections::BTreeSet;

use super::*;
use crate::{
    cluster::services::feed::ServicesState,
    dial::audit::totals::Totals,
    kernel::observe::packets::PacketCounter,
    report::status::tests::running,
    tunnel::handle::{CredentialsState, StreamState},
};

const DOCS: &str = include_str!("../../../docs/metrics.md");

#[test]
fn a_denial_is_a_counter_with_its_reason() {
    let counter = PacketCounter {
        rule: "kubelet".into(),
        reason: "no-selector".into(),
        verdict: "Deny".into(),
        audited: false,
        packets: 3,
    };
    let text = encode(&Status { counters: vec![counter], ..Status::default() });
    let line = r#"nodeguard_packets_total{rule="kubelet",reason="no-selector",verdict="Deny",audited="false"} 3"#;
    assert!(text.contains(line), "{text}");
    assert!(text.contains("\n# TYPE nodeguard_packets_total counter\n"), "{text}");
    assert!(!text.contains("# EOF"));
}

#[test]
fn every_stream_and_every_address_without_one_counts_by_its_state() {
    let streams = [StreamPhase::Connected, StreamPhase::Connected, StreamPhase::Draining, StreamPhase::Waiting];
    let streams = streams.map(|state| StreamState { state, ..StreamState::default() }).into();
    let material = CredentialsState { failures: 2, broken: Some("no key".into()), ..CredentialsState::default() };
    let tunnel = Some(TunnelState { streams, material, ..TunnelState::default() });
    let text = encode(&Status { tunnel, ..Status::default() });
    for line in [
        r#"nodeguard_tunnel_streams{state="connected"} 2"#,
        r#"nodeguard_tunnel_streams{state="draining"} 1"#,
        r#"nodeguard_tunnel_streams{state="connecting"} 0"#,
        r#"nodeguard_tunnel_streams{state="waiting"} 1"#,
        "nodeguard_tunnel_material_broken 1",
        "nodeguard_tunnel_material_failures_total 2",
    ] {
        assert!(text.lines().any(|each| each == line), "{line}: {text}");
    }
}

#[test]
fn the_text_has_every_family_also_when_nothing_happened() {
    let dialling = Dialling { totals: Totals::default(), ..Dialling::default() };
    let text = encode(&Status { dialling, ..Status::default() });
    let heads: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE nodeguard_dial")).collect();
    assert_eq!(heads.len(), 5, "{heads:?}");
    assert!(text.contains("nodeguard_dial_bytes_total{direction=\"to_backend\"} 0\n"));
}

#[test]
fn the_age_of_services_is_a_metric() {
    let services = Some(ServicesState { age_seconds: Some(192), ..ServicesState::default() });
    let text = encode(&Status { dialling: Dialling { services, ..Dialling::default() }, ..Status::default() });
    assert!(text.contains("\nnodeguard_services_age_seconds 192\n"), "{text}");
}

#[test]
fn the_metrics_and_their_page_are_the_same_set() {
    let served: BTreeSet<String> = families(&running())
        .iter()
        .map(|family| {
            let labels = family.labels();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            format!("{}{labels} {}", family.name, family.kind.name())
        })
        .collect();
    let documented: BTreeSet<String> = DOCS.lines().flat_map(documented).collect();
    let missing: Vec<&String> = served.difference(&documented).collect();
    let gone: Vec<&String> = documented.difference(&served).collect();
    assert!(missing.is_empty() && gone.is_empty(), "not in docs/metrics.md: {missing:#?}\nnot served: {gone:#?}");
    assert_eq!(served.len(), families(&running()).len(), "a family twice");
}

/// The metrics of a row `| `name{labels}`, ... | type | meaning |`.
fn documented(line: &str) -> Vec<String> {
    let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
    let [names, kind, _] = cells.as_slice() else { return Vec::new() };
    let names = names.split('`').filter(|name| name.contains('_'));
    names.map(|name| format!("{name} {kind}")).collect()
}
