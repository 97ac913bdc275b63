//! Owns the tests of the status: a full value, the published schema, and the JSON in three states.

use std::{path::Path, time::Duration};

use super::*;
use crate::{
    cluster::{
        leases::{LeaseAnswers, LeasesState},
        services::feed::ServicesState,
    },
    dial::{
        audit::{
            file::FileState,
            totals::{OutcomeCount, Totals},
        },
        kubelet::check::{CertificateChecks, CertificateState},
    },
    report::{assess::weaknesses, stopped::from_pins},
    tunnel::handle::{CredentialsState, OutdatedStream, StreamPhase, StreamState},
    wire::counts::{ErrorCount, MessageCount, StreamCounts},
};

const SCHEMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/status.schema.json");

/// A running guard with a value in every field.
pub(crate) fn running() -> Status {
    let mut totals = Totals::default();
    totals.dials.push(OutcomeCount { verdict: "admitted".into(), reason: "open".into(), count: 2 });
    totals.closed.push(OutcomeCount { verdict: "admitted".into(), reason: "backend-closed".into(), count: 1 });
    totals.dial_seconds.observe(Duration::from_millis(3));
    let mut answers = LeaseAnswers::default();
    answers.add(200, "", Duration::from_millis(9));
    let rule = RuleStatus {
        name: "kubelet".into(),
        mode: Some(Mode::Enforce),
        guards: "node 10250".into(),
        allows: "tunnel".into(),
    };
    Status {
        daemon: true,
        mode: Some(Mode::Enforce),
        policy: PolicyStatus {
            name: "worker".into(),
            path: "/etc/nodeguard/policy.yaml".into(),
            digest: "5f70".into(),
            epoch: 3,
            since: Some("2026-11-29T15:00:00Z".into()),
            rules: vec![rule],
            last_error: None,
        },
        programs: vec![Attachment {
            name: "guard_ingress".into(),
            attached: true,
            link_id: Some(7),
            program_id: Some(8),
        }],
        namespace_by: Some(NamespaceBy::Cookie),
        maps: vec![PinnedMap { name: "PORTS".into(), id: 4 }],
        edge: vec![EdgeLink { interface: "eth0".into(), hook: "tcx".into(), attached: true, ..EdgeLink::default() }],
        map_use: vec![MapUse { name: "PORTS".into(), entries: 1, capacity: 100 }],
        program_use: vec![ProgramUse { name: "guard_ingress".into(), runs: 9, seconds: 0.25 }],
        tunnel: Some(TunnelState {
            streams: vec![StreamState {
                server: "10.0.0.9:8132".into(),
                server_id: Some("a".into()),
                state: StreamPhase::Connected,
                since: "2026-11-29T15:00:00Z".into(),
                tls: Some("TLSv1_3".into()),
                dials: Some(1),
                made_with: Some(1),
                last_error: None,
            }],
            known_servers: 1,
            identifiers: "ipv4=10.0.0.2".into(),
            material: CredentialsState { in_use: 1, ..CredentialsState::default() },
            outdated: Vec::new(),
            leases: Some(LeasesState { count: 1, last_error: None, answers }),
            messages: StreamCounts {
                packets: vec![MessageCount { segment: "to_agent".into(), packet_type: "DATA".into(), count: 5 }],
                errors: vec![ErrorCount { code: "Unavailable".into(), count: 1 }],
            },
        }),
        counters: vec![PacketCounter {
            rule: "kubelet".into(),
            reason: "no-selector".into(),
            verdict: "Deny".into(),
            audited: false,
            packets: 3,
        }],
        health: vec![LossCounter { name: "events-lost".into(), count: 0, weakens: true }],
        cut: 1,
        mended: 1,
        last_denies: vec![Denial {
            time: "2026-11-29T15:00:00.000Z".into(),
            source: "192.0.2.1:40000".parse().unwrap(),
            destination: "10.0.0.2".parse().unwrap(),
            port: 10250,
            rule: "kubelet".into(),
            reason: "no-selector".into(),
            audited: false,
            epoch: 3,
            repeats: 0,
        }],
        last_refused_dials: vec![RefusedDial {
            time: "2026-11-29T15:00:00.000Z".into(),
            requested: "169.254.169.254:80".into(),
            address: Some("169.254.169.254:80".parse().unwrap()),
            reason: "link-local".into(),
            message: "link-local addresses are never dialled".into(),
        }],
        dials: Some(DialCounts { admitted: 2, refused: 1, failed: 2, timed_out: 1, open: 1 }),
        dialling: Dialling {
            totals,
            audit_file: Some(FileState { path: "/var/log/audit.log".into(), written: 3, lost: 0, error: None }),
            certificates: vec![CertificateState {
                address: "10.0.0.2:10250".parse().unwrap(),
                checked: "2026-11-29T15:00:00.000Z".into(),
                sha256: Some("00ff".into()),
                error: None,
            }],
            certificate_checks: CertificateChecks { held: 1, refused: 0, unreachable: 0 },
            services: Some(ServicesState { read: true, age_seconds: Some(0), ..ServicesState::default() }),
        },
        ..Status::default()
    }
}

/// The same guard with everything weakened that a status can show.
fn weakened() -> Status {
    let mut status = running();
    status.mode = Some(Mode::Audit);
    status.policy.last_error = Some("error[NG004]: ...".into());
    status.programs[0] = Attachment { name: "guard_ingress".into(), attached: false, link_id: None, program_id: None };
    status.edge[0] = EdgeLink { interface: "eth0".into(), note: "no such interface".into(), ..EdgeLink::default() };
    status.map_use[0].entries = 95;
    status.health[0].count = 2;
    let tunnel = status.tunnel.as_mut().unwrap();
    tunnel.material.broken = Some("no key".into());
    tunnel.outdated = vec![OutdatedStream { server: "10.0.0.9:8132".into(), error: "revoked".into() }];
    status.dialling.audit_file.as_mut().unwrap().error = Some("no space left".into());
    status.dialling.certificates[0].error = Some("not signed by the CA".into());
    status.weakened = weaknesses(&status);
    status
}

fn schema() -> serde_json::Value {
    let generator = schemars::generate::SchemaSettings::draft2020_12().for_serialize().into_generator();
    generator.into_root_schema_for::<Status>().to_value()
}

#[test]
fn the_published_schema_is_the_one_of_the_types() {
    let written = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
    if std::env::var_os("NODEGUARD_WRITE_SCHEMA").is_some() {
        std::fs::write(SCHEMA, &written).unwrap();
    }
    let published = std::fs::read_to_string(SCHEMA).unwrap_or_default();
    assert!(
        published == written,
        "docs/status.schema.json differs from the types; NODEGUARD_WRITE_SCHEMA=1 with this test writes it anew"
    );
}

#[test]
fn status_as_json_is_valid_when_running_stopped_and_weakened() {
    let validator = jsonschema::draft202012::new(&schema()).unwrap();
    let stopped = from_pins(Path::new("/nonexistent/bpf"));
    let weakened = weakened();
    assert_eq!((stopped.daemon, stopped.weakened.len()), (false, 1));
    assert_eq!(weakened.weakened.len(), 10, "{:?}", weakened.weakened);
    for (name, status) in [("running", running()), ("stopped", stopped), ("weakened", weakened)] {
        let json = serde_json::to_value(&status).unwrap();
        let errors: Vec<String> = validator.iter_errors(&json).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{name}: {errors:#?}");
        assert_eq!(json["apiVersion"], "nodeguard.dev/status/v1", "{name}");
        let again: Status = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(&again).unwrap(), json, "{name}: what is read is what was written");
    }
    let mut wrong = serde_json::to_value(running()).unwrap();
    wrong["tunnel"]["streams"][0]["state"] = "asleep".into();
    assert!(!validator.is_valid(&wrong), "the schema is no formality");
}

#[test]
fn a_reason_is_named_as_its_json() {
    for weakness in weakened().weakened {
        assert_eq!(serde_json::to_value(weakness.reason).unwrap(), weakness.reason.name());
    }
}
