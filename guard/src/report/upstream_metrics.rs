//! Owns the metrics of the upstream agent: the same names, labels and HELP, so that its dashboards and alerts go on working.
//! Called by `metrics`, for each scrape.
//! Must never differ from upstream in a name or a HELP: its own test suite compares them.

use std::fmt::{self, Write};

use serde_json::Value;

use crate::{cluster::leases, report::status::Status, wire::counts};

const PREFIX: &str = "konnectivity_network_proxy_agent_";

/// Writes them in Prometheus' text format. As upstream, a family with labels is left out until it counts something.
pub fn encode(out: &mut String, status: &Status) -> fmt::Result {
    let dials = |name: &str| status.dials.get(name).and_then(Value::as_u64).unwrap_or(0);
    let streams = status.tunnel.get("streams").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let is_up = |stream: &&Value| {
        stream.get("state").and_then(Value::as_str).is_some_and(|state| matches!(state, "connected" | "draining"))
    };
    let known = status.tunnel.get("knownServers").and_then(Value::as_u64);
    let gauges = [
        ("known_server_count", "Current number of servers agent is trying to connect to.", known.unwrap_or(1)),
        ("open_endpoint_connections", "Current number of open endpoint connections.", dials("open")),
        (
            "open_server_connections",
            "Current number of open server connections.",
            streams.iter().filter(is_up).count() as u64,
        ),
    ];
    for (name, help, value) in gauges {
        writeln!(out, "# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} gauge\n{PREFIX}{name} {value}")?;
    }
    let timed_out = dials("timedOut");
    let unknown = dials("refused") + dials("failed").saturating_sub(timed_out);
    let failures = [("timeout", timed_out), ("unknown", unknown)];
    counters(
        out,
        "endpoint_dial_failure_total",
        "Number of failures dialing the remote endpoint, by reason (example: timeout).",
        "reason",
        &failures,
    )?;
    let dials = &status.dialling.totals.dial_seconds;
    if dials.count() > 0 {
        dials.encode(
            out,
            &format!("{PREFIX}dial_duration_seconds"),
            "Latency of dial to the remote endpoint in seconds",
        )?;
    }
    leases::encode(out, PREFIX)?;
    counts::encode(out, PREFIX)
}

fn counters(out: &mut String, name: &str, help: &str, label: &str, values: &[(&str, u64)]) -> fmt::Result {
    if values.iter().all(|(_, count)| *count == 0) {
        return Ok(());
    }
    writeln!(out, "# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} counter")?;
    for (value, count) in values.iter().filter(|(_, count)| *count > 0) {
        writeln!(out, "{PREFIX}{name}{{{label}=\"{value}\"}} {count}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_nothing_is_left_out_and_the_rest_is_upstreams() {
        let mut status = Status {
            tunnel: serde_json::json!({"streams": [{"state": "connected"}, {"state": "draining"}, {"state": "waiting"}], "knownServers": 3}),
            dials: serde_json::json!({"open": 2, "failed": 0, "refused": 0, "timedOut": 0}),
            ..Status::default()
        };
        let mut text = String::new();
        encode(&mut text, &status).unwrap();
        assert!(text.contains("\nkonnectivity_network_proxy_agent_open_server_connections 2\n"), "{text}");
        assert!(text.contains("\nkonnectivity_network_proxy_agent_known_server_count 3\n"));
        assert!(!text.contains("endpoint_dial_failure_total"));
        status.dials = serde_json::json!({"open": 2, "failed": 3, "refused": 1, "timedOut": 2});
        text.clear();
        encode(&mut text, &status).unwrap();
        assert!(text.contains("endpoint_dial_failure_total{reason=\"timeout\"} 2\n"), "{text}");
        assert!(text.contains("endpoint_dial_failure_total{reason=\"unknown\"} 2\n"), "{text}");
    }
}
