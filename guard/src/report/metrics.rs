//! Owns the metrics: the status as families, ours and those of the upstream agent.
//! Called by `admin` for each scrape.
//! Must never have a label without bounds: rule names are bounded by the policy, and no address appears.

use crate::{
    dial::dialling::Dialling,
    report::{
        prometheus_text::{self, Family},
        status::Status,
        upstream_metrics,
    },
    tunnel::handle::{StreamPhase, TunnelState},
};

pub(crate) use crate::report::prometheus_text::CONTENT_TYPE;

/// The metrics of a status, as Prometheus reads them.
pub fn encode(status: &Status) -> String {
    prometheus_text::encode(&families(status))
}

/// Every family that this status has. A new metric is one entry here and one row in `docs/metrics.md`.
fn families(status: &Status) -> Vec<Family> {
    let mut all = upstream_metrics::families(status);
    all.extend(of_dials(&status.dialling));
    all.extend(of_policy(status));
    all.extend(of_tunnel(status.tunnel.as_ref()));
    all.extend(of_kernel(status));
    all
}

fn of_dials(dialling: &Dialling) -> Vec<Family> {
    let Dialling { totals, audit_file, certificates, certificate_checks, services } = dialling;
    let mut all = vec![
        Family::counter("nodeguard_dials_total", "Dials of the control plane by outcome and reason.")
            .each(&totals.dials, |family, dials| {
                family.with([("outcome", &dials.verdict), ("reason", &dials.reason)], dials.count)
            }),
        Family::counter("nodeguard_dials_closed_total", "Open dials that have ended, by reason.")
            .each(&totals.closed, |family, dials| family.with([("reason", &dials.reason)], dials.count)),
        Family::counter("nodeguard_dial_bytes_total", "Bytes of dials that have ended, by direction.")
            .with([("direction", "to_backend")], totals.to_backend)
            .with([("direction", "to_control_plane")], totals.to_control_plane),
        Family::histogram(
            "nodeguard_dial_duration_seconds",
            "From the request to its answer, of dials that were admitted.",
        )
        .value(&totals.dial_seconds),
        Family::histogram("nodeguard_dial_open_seconds", "How long dials that have ended were open.")
            .value(&totals.open_seconds),
    ];
    if let Some(file) = audit_file {
        all.push(
            Family::counter(
                "nodeguard_audit_file_records_total",
                "Records for the audit file, by what became of them.",
            )
            .with([("result", "written")], file.written)
            .with([("result", "lost")], file.lost),
        );
        all.push(
            Family::gauge("nodeguard_audit_file_failing", "1 if the last write to the audit file failed.")
                .value(file.error.is_some()),
        );
    }
    if let Some(services) = services {
        all.push(
            Family::gauge("nodeguard_services_read", "1 if the cluster's Services were read completely.")
                .value(services.read),
        );
        all.push(
            Family::gauge("nodeguard_services", "Services with a ClusterIP that are known.").value(services.services),
        );
        all.push(
            Family::gauge("nodeguard_service_endpoints", "Endpoints of Services that are known.")
                .value(services.endpoints),
        );
        let age = Family::gauge(
            "nodeguard_services_age_seconds",
            "Seconds since the last news of Services; 0 while the watch is open.",
        );
        all.extend(services.age_seconds.map(|seconds| age.value(seconds)));
        all.push(
            Family::counter("nodeguard_services_watch_errors_total", "Times that a list or watch of Services failed.")
                .value(services.errors),
        );
    }
    all.push(
        Family::counter(
            "nodeguard_kubelet_certificate_checks_total",
            "Checks of kubelet's serving certificate, by result.",
        )
        .with([("result", "held")], certificate_checks.held)
        .with([("result", "refused")], certificate_checks.refused)
        .with([("result", "unreachable")], certificate_checks.unreachable),
    );
    let refused = certificates.iter().filter(|certificate| certificate.error.is_some()).count();
    all.push(
        Family::gauge(
            "nodeguard_kubelet_certificates_refused",
            "Addresses of kubelet whose serving certificate is refused now.",
        )
        .value(refused),
    );
    all
}

fn of_policy(status: &Status) -> Vec<Family> {
    let enforcing = status.mode == Some(guard_policy::ruleset::Mode::Enforce);
    vec![
        Family::gauge("nodeguard_policy_epoch", "Epoch of the ruleset in force; 0 means none.")
            .value(status.policy.epoch),
        Family::gauge("nodeguard_policy_enforcing", "1 if the policy enforces, 0 if it only audits.").value(enforcing),
        Family::gauge(
            "nodeguard_policy_rejected",
            "1 if the last edit was rejected and the policy before it stays in force.",
        )
        .value(status.policy.last_error.is_some()),
        Family::gauge("nodeguard_weakened", "Number of things that weaken protection right now.")
            .value(status.weakened.len()),
    ]
}

fn of_tunnel(tunnel: Option<&TunnelState>) -> Vec<Family> {
    let count = |phase: StreamPhase| {
        tunnel.map_or(0, |tunnel| tunnel.streams.iter().filter(|each| each.state == phase).count())
    };
    vec![
        Family::gauge(
            "nodeguard_tunnel_streams",
            "Streams to proxy-servers (connected, draining) and addresses that should have one (connecting, waiting).",
        )
        .each(StreamPhase::ALL, |family, phase| family.with([("state", phase.name())], count(phase))),
        Family::gauge(
            "nodeguard_tunnel_material_broken",
            "1 if the certificates or the token on disk cannot be used and the previous ones stay in use.",
        )
        .value(tunnel.is_some_and(|tunnel| tunnel.material.broken.is_some())),
        Family::counter(
            "nodeguard_tunnel_material_failures_total",
            "Times that changed certificates or a changed token could not be used.",
        )
        .value(tunnel.map_or(0, |tunnel| tunnel.material.failures)),
    ]
}

fn of_kernel(status: &Status) -> Vec<Family> {
    let Status { programs, edge, map_use, program_use, counters, health, cut, mended, .. } = status;
    let mut all = vec![
        Family::gauge("nodeguard_program_attached", "1 if the kernel program is attached.")
            .each(programs, |family, program| family.with([("program", &program.name)], program.attached)),
        Family::gauge(
            "nodeguard_edge_attached",
            "1 if the edge tier is attached to the interface, with the hook that it is attached by.",
        )
        .each(edge, |family, link| family.with([("interface", &link.interface), ("hook", &link.hook)], link.attached)),
        Family::gauge("nodeguard_map_entries", "Entries of a kernel map that are in use.")
            .each(map_use, |family, map| family.with([("map", &map.name)], map.entries)),
        Family::gauge(
            "nodeguard_map_capacity",
            "Entries that a kernel map can have; of a ruleset's table, those that one ruleset can have.",
        )
        .each(map_use, |family, map| family.with([("map", &map.name)], map.capacity)),
    ];
    if !program_use.is_empty() {
        all.push(
            Family::counter(
                "nodeguard_program_seconds_total",
                "How long a kernel program ran in all, if the kernel measures it.",
            )
            .each(program_use, |family, program| family.with([("program", &program.name)], program.seconds)),
        );
        all.push(
            Family::counter(
                "nodeguard_program_runs_total",
                "How often a kernel program ran, if the kernel measures it.",
            )
            .each(program_use, |family, program| family.with([("program", &program.name)], program.runs)),
        );
    }
    all.extend([
        Family::counter(
            "nodeguard_packets_total",
            "Packets to guarded ports that reached a listener or were denied, by rule and reason.",
        )
        .each(counters, |family, counter| {
            let labels = [
                ("rule", counter.rule.as_str()),
                ("reason", &counter.reason),
                ("verdict", &counter.verdict),
                ("audited", if counter.audited { "true" } else { "false" }),
            ];
            family.with(labels, counter.packets)
        }),
        Family::counter(
            "nodeguard_kernel_lost_total",
            "What the kernel half could not do: events or pinholes that did not fit.",
        )
        .each(health, |family, loss| family.with([("what", &loss.name)], loss.count)),
        Family::counter(
            "nodeguard_connections_cut_total",
            "Open connections that were cut because the policy in force does not admit them.",
        )
        .value(*cut),
        Family::counter(
            "nodeguard_mended_total",
            "Pins, links and tables that were restored because something else removed or changed them.",
        )
        .value(*mended),
    ]);
    all
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
