//! Owns the metrics of the upstream agent: the same names, labels, buckets and HELP, so that its dashboards and alerts keep working.
//! Called by `metrics` for each scrape.
//! Must never differ from upstream in a name or a HELP: upstream's own test suite compares them.

use crate::{
    report::{prometheus_text::Family, status::Status},
    tunnel::handle::StreamPhase,
};

/// The families of a status. As in the upstream agent, a family with labels is missing until it counts something.
pub(crate) fn families(status: &Status) -> Vec<Family> {
    let dials = status.dials.unwrap_or_default();
    let tunnel = status.tunnel.as_ref();
    let known = tunnel.map_or(1, |tunnel| tunnel.known_servers);
    let is_up = |phase: StreamPhase| matches!(phase, StreamPhase::Connected | StreamPhase::Draining);
    let up = tunnel.map_or(0, |tunnel| tunnel.streams.iter().filter(|stream| is_up(stream.state)).count());
    let mut all = vec![
        Family::gauge(
            "konnectivity_network_proxy_agent_known_server_count",
            "Current number of servers agent is trying to connect to.",
        )
        .value(known),
        Family::gauge(
            "konnectivity_network_proxy_agent_open_endpoint_connections",
            "Current number of open endpoint connections.",
        )
        .value(dials.open),
        Family::gauge(
            "konnectivity_network_proxy_agent_open_server_connections",
            "Current number of open server connections.",
        )
        .value(up),
    ];
    let failures =
        [("timeout", dials.timed_out), ("unknown", dials.refused + dials.failed.saturating_sub(dials.timed_out))];
    let mut counted = vec![
        Family::counter(
            "konnectivity_network_proxy_agent_endpoint_dial_failure_total",
            "Number of failures dialing the remote endpoint, by reason (example: timeout).",
        )
        .each(failures.into_iter().filter(|(_, count)| *count > 0), |family, (reason, count)| {
            family.with([("reason", reason)], count)
        }),
        Family::histogram(
            "konnectivity_network_proxy_agent_dial_duration_seconds",
            "Latency of dial to the remote endpoint in seconds",
        )
        .each(Some(&status.dialling.totals.dial_seconds).filter(|dials| dials.count() > 0), Family::value),
    ];
    if let Some(tunnel) = tunnel {
        let answers = tunnel.leases.iter().map(|leases| &leases.answers);
        counted.extend([
            Family::counter(
                "konnectivity_network_proxy_agent_lease_lists_total",
                "Count of server lease list calls made by the agent to the k8s apiserver, labeled by HTTP response code and reason",
            )
            .each(answers.clone().flat_map(|answers| &answers.lists), |family, lists| {
                let code = lists.code.to_string();
                family.with([("http_response_code", &code), ("reason", &lists.reason)], lists.count)
            }),
            Family::histogram(
                "konnectivity_network_proxy_agent_lease_list_latency_seconds",
                "Latency of server lease listing in seconds",
            )
            .each(answers.flat_map(|answers| &answers.latency), |family, latency| {
                family.with([("http_response_code", &latency.code.to_string())], &latency.seconds)
            }),
            Family::counter(
                "konnectivity_network_proxy_agent_server_connection_failure_count",
                "Count of failures to send to or receive from the proxy server, labeled by the direction (from_server or to_server). DEPRECATED, please use stream_events_error_total",
            )
            .each(
                Some(tunnel.messages.errors.iter().map(|error| error.count).sum::<u64>()).filter(|count| *count > 0),
                |family, count| family.with([("direction", "from_server")], count),
            ),
            Family::counter(
                "konnectivity_network_proxy_agent_stream_errors_total",
                "Count of gRPC stream errors, by segment, grpc Code, packet type. (example: from_agent, Code.Unavailable, DIAL_RSP)",
            )
            .each(&tunnel.messages.errors, |family, error| {
                family.with([("segment", "to_agent"), ("code", &error.code), ("packet_type", "Unknown")], error.count)
            }),
            Family::counter(
                "konnectivity_network_proxy_agent_stream_packets_total",
                "Count of packets processed, by segment and packet type (example: from_client, DIAL_REQ)",
            )
            .each(&tunnel.messages.packets, |family, packets| {
                family.with([("segment", &packets.segment), ("packet_type", &packets.packet_type)], packets.count)
            }),
        ]);
    }
    all.extend(counted.into_iter().filter(|family| !family.is_empty()));
    all
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        cluster::leases::LeasesState,
        dial::connections::DialCounts,
        report::prometheus_text::encode,
        tunnel::handle::{StreamState, TunnelState},
        wire::counts::{ErrorCount, MessageCount, StreamCounts},
    };

    #[test]
    fn what_counts_nothing_is_left_out_and_the_rest_is_upstreams() {
        let streams = [StreamPhase::Connected, StreamPhase::Draining, StreamPhase::Waiting];
        let streams = streams.map(|state| StreamState { state, ..StreamState::default() }).into();
        let mut status = Status {
            tunnel: Some(TunnelState { streams, known_servers: 3, ..TunnelState::default() }),
            dials: Some(DialCounts { open: 2, ..DialCounts::default() }),
            ..Status::default()
        };
        let text = encode(&families(&status));
        assert!(text.contains("\nkonnectivity_network_proxy_agent_open_server_connections 2\n"), "{text}");
        assert!(text.contains("\nkonnectivity_network_proxy_agent_known_server_count 3\n"));
        assert!(!text.contains("endpoint_dial_failure_total"));
        status.dials = Some(DialCounts { open: 2, failed: 3, refused: 1, timed_out: 2, ..DialCounts::default() });
        let text = encode(&families(&status));
        assert!(text.contains("endpoint_dial_failure_total{reason=\"timeout\"} 2\n"), "{text}");
        assert!(text.contains("endpoint_dial_failure_total{reason=\"unknown\"} 2\n"), "{text}");
    }

    #[test]
    fn answers_are_upstreams_metrics() {
        let mut leases = LeasesState::default();
        let of = |leases: &LeasesState| {
            let tunnel = TunnelState { leases: Some(leases.clone()), ..TunnelState::default() };
            encode(&families(&Status { tunnel: Some(tunnel), ..Status::default() }))
        };
        assert!(!of(&leases).contains("lease_list"));
        leases.answers.add(200, "", Duration::from_millis(50));
        leases.answers.add(200, "", Duration::from_secs(60));
        leases.answers.add(403, "Forbidden", Duration::from_millis(10));
        leases.answers.add(500, "a \"quoted\" text", Duration::from_millis(10));
        let text = of(&leases);
        for line in [
            "lease_lists_total{http_response_code=\"200\",reason=\"\"} 2",
            "lease_lists_total{http_response_code=\"403\",reason=\"Forbidden\"} 1",
            "lease_lists_total{http_response_code=\"500\",reason=\"\"} 1",
            "lease_list_latency_seconds_bucket{http_response_code=\"200\",le=\"0.1\"} 1",
            "lease_list_latency_seconds_bucket{http_response_code=\"200\",le=\"+Inf\"} 2",
            "lease_list_latency_seconds_count{http_response_code=\"403\"} 1",
        ] {
            let line = format!("konnectivity_network_proxy_agent_{line}");
            assert!(text.lines().any(|each| each == line), "{line}: {text}");
        }
    }

    #[test]
    fn messages_and_errors_of_streams_are_upstreams_metrics() {
        let messages = StreamCounts {
            packets: vec![MessageCount { segment: "to_agent".into(), packet_type: "UNKNOWN".into(), count: 4 }],
            errors: vec![ErrorCount { code: "Internal".into(), count: 1 }],
        };
        let tunnel = Some(TunnelState { messages, ..TunnelState::default() });
        let text = encode(&families(&Status { tunnel, ..Status::default() }));
        for line in [
            "stream_packets_total{segment=\"to_agent\",packet_type=\"UNKNOWN\"} 4",
            "stream_errors_total{segment=\"to_agent\",code=\"Internal\",packet_type=\"Unknown\"} 1",
            "server_connection_failure_count{direction=\"from_server\"} 1",
        ] {
            let line = format!("konnectivity_network_proxy_agent_{line}");
            assert!(text.lines().any(|each| each == line), "{line}: {text}");
        }
    }
}
