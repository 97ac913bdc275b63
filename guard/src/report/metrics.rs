//! Owns the metrics: a snapshot as Prometheus text, ours and those of the upstream agent.
//! Called by `admin`, for each scrape.
//! Must never carry a label without bounds: rule names are bounded by the policy, addresses never appear.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use crate::report::{edge, status::Status, upstream_metrics, usage};

/// What a scraper is told about the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Encodes a snapshot.
pub fn encode(status: Status) -> Result<String, fmt::Error> {
    let mut out = String::new();
    upstream_metrics::encode(&mut out, &status)?;
    status.dialling.encode(&mut out)?;
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshot(status)));
    let mut ours = String::new();
    text::encode(&mut ours, &registry)?;
    out.push_str(&classic(&ours));
    Ok(out)
}

/// OpenMetrics in Prometheus' own text format, which is what upstream's metrics need: there a counter's family has the name of its samples.
fn classic(open: &str) -> String {
    let counters: Vec<&str> =
        open.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let line = |line: &str| {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("EOF"), ..) => String::new(),
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                format!("# {what} {name}_total {rest}\n")
            }
            _ => format!("{line}\n"),
        }
    };
    open.lines().map(line).collect()
}

#[derive(Debug)]
struct Snapshot(Status);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Status { policy, programs, counters, health, cut, mended, weakened, tunnel, mode, .. } = &self.0;
        let Status { edge, map_use, program_use, .. } = &self.0;
        gauge(
            &mut encoder,
            "nodeguard_policy_epoch",
            "Epoch of the ruleset in force; 0 means none.",
            policy.epoch.into(),
        )?;
        gauge(
            &mut encoder,
            "nodeguard_policy_enforcing",
            "1 where the policy enforces, 0 where it only audits.",
            (mode == "Enforce").into(),
        )?;
        gauge(
            &mut encoder,
            "nodeguard_policy_rejected",
            "1 where the last edit was rejected and the one before it stays in force.",
            policy.last_error.is_some().into(),
        )?;
        gauge(
            &mut encoder,
            "nodeguard_weakened",
            "Number of things that weaken protection right now.",
            weakened.len() as i64,
        )?;
        let streams =
            tunnel.get("streams").and_then(serde_json::Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let mut family = encoder.encode_descriptor(
            "nodeguard_tunnel_streams",
            "Streams to proxy-servers (connected, draining) and addresses that should have one (connecting, waiting).",
            None,
            MetricType::Gauge,
        )?;
        for state in ["connected", "draining", "connecting", "waiting"] {
            let is_so =
                |stream: &&serde_json::Value| stream.get("state").and_then(|state| state.as_str()) == Some(state);
            let count = streams.iter().filter(is_so).count();
            ConstGauge::new(count as i64).encode(family.encode_family(&[("state", state)])?)?;
        }
        let material = |name: &str| tunnel.get("material").and_then(|material| material.get(name));
        gauge(
            &mut encoder,
            "nodeguard_tunnel_material_broken",
            "1 where the certificates or the token on disk cannot be used and those from before stay in use.",
            material("broken").is_some_and(|broken| !broken.is_null()).into(),
        )?;
        let broken = encoder.encode_descriptor(
            "nodeguard_tunnel_material_failures",
            "Times that changed certificates or a changed token could not be used.",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(material("failures").and_then(serde_json::Value::as_u64).unwrap_or(0)).encode(broken)?;

        let mut family = encoder.encode_descriptor(
            "nodeguard_program_attached",
            "1 where the kernel program is attached.",
            None,
            MetricType::Gauge,
        )?;
        for program in programs {
            let labels = [("program", program.name.as_str())];
            ConstGauge::new(i64::from(program.attached)).encode(family.encode_family(&labels)?)?;
        }
        edge::encode(edge, &mut encoder)?;
        usage::encode(map_use, program_use, &mut encoder)?;
        let mut family = encoder.encode_descriptor(
            "nodeguard_packets",
            "Packets to guarded ports that reached a listener or were denied, by rule and reason.",
            None,
            MetricType::Counter,
        )?;
        for counter in counters {
            let audited = if counter.audited { "true" } else { "false" };
            let labels = [
                ("rule", counter.rule.as_str()),
                ("reason", counter.reason.as_str()),
                ("verdict", counter.verdict.as_str()),
                ("audited", audited),
            ];
            ConstCounter::new(counter.packets).encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor(
            "nodeguard_kernel_lost",
            "What the kernel half could not do: events or pinholes that did not fit.",
            None,
            MetricType::Counter,
        )?;
        for lost in health {
            ConstCounter::new(lost.count).encode(family.encode_family(&[("what", lost.name.as_str())])?)?;
        }
        let cut_total = encoder.encode_descriptor(
            "nodeguard_connections_cut",
            "Open connections that were cut because the policy in force does not admit them.",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(*cut).encode(cut_total)?;
        let mended_total = encoder.encode_descriptor(
            "nodeguard_mended",
            "Pins, links and tables that were mended because somebody else removed or changed them.",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(*mended).encode(mended_total)?;
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: i64) -> Result<(), fmt::Error> {
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::status::Counter;

    #[test]
    fn a_denial_is_a_counter_with_its_reason() {
        let counter = Counter {
            rule: "kubelet".into(),
            reason: "no-selector".into(),
            verdict: "Deny".into(),
            audited: false,
            packets: 3,
        };
        let text = encode(Status { counters: vec![counter], ..Status::default() }).unwrap();
        let line = r#"nodeguard_packets_total{rule="kubelet",reason="no-selector",verdict="Deny",audited="false"} 3"#;
        assert!(text.contains(line), "{text}");
        assert!(text.contains("\n# TYPE nodeguard_packets_total counter\n"), "{text}");
        assert!(!text.contains("# EOF"));
    }

    #[test]
    fn every_stream_and_every_address_without_one_counts_by_its_state() {
        let streams =
            ["connected", "connected", "draining", "waiting"].map(|state| serde_json::json!({"state": state}));
        let tunnel = serde_json::json!({"streams": streams, "material": {"failures": 2, "broken": "no key"}});
        let text = encode(Status { tunnel, ..Status::default() }).unwrap();
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
}
