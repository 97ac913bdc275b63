//! Owns what is told of the kernel half's own use: how full its maps are, how long its programs ran.
//! Called by `snapshot`, `status` and `metrics`.
//! Must never tell a map that fills up only when it is full.

use std::{
    fmt,
    io::{self, Write},
};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::{
    kernel::observe::map_use::{MapUse, ProgramUse},
    report::table::Table,
};

/// From how many percent on a map counts as nearly full.
const NEARLY: u64 = 90;
/// A table whose oldest entries make way, and which is therefore full sooner or later.
const MAKES_WAY: &str = "CONNECTING";

/// The maps that are nearly full, a sentence each.
pub fn weakened(maps: &[MapUse]) -> impl Iterator<Item = String> {
    maps.iter()
        .filter(|map| map.percent() >= NEARLY && map.name != MAKES_WAY)
        .map(|map| format!("the map {} is {} % full ({} of {})", map.name, map.percent(), map.entries, map.capacity))
}

/// The tables of `status`.
pub fn render(maps: &[MapUse], programs: &[ProgramUse], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&["MAP", "ENTRIES", "CAPACITY", "USED"]);
    for map in maps {
        let MapUse { name, entries, capacity } = map;
        table.row([name.clone(), entries.to_string(), capacity.to_string(), format!("{}%", map.percent())]);
    }
    table.write(out)?;
    let mut table = Table::new(&["RAN", "RUNS", "SECONDS", "NS/RUN"]);
    for ProgramUse { name, runs, seconds } in programs {
        let each = seconds * 1e9 / (*runs).max(1) as f64;
        table.row([name.clone(), runs.to_string(), format!("{seconds:.3}"), format!("{each:.0}")]);
    }
    table.write(out)
}

/// The metrics.
pub fn encode(maps: &[MapUse], programs: &[ProgramUse], encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let mut gauge = |name: &str, help: &str, value: fn(&MapUse) -> u64| {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        maps.iter().try_for_each(|map| {
            ConstGauge::new(value(map) as i64).encode(family.encode_family(&[("map", map.name.as_str())])?)
        })
    };
    gauge("nodeguard_map_entries", "Entries of a kernel map that are in use.", |map| map.entries)?;
    let help = "Entries that a kernel map can have; of a ruleset's table, those that one ruleset can have.";
    gauge("nodeguard_map_capacity", help, |map| map.capacity)?;
    if programs.is_empty() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(
        "nodeguard_program_seconds",
        "How long a kernel program ran in all, where the kernel measures it.",
        None,
        MetricType::Counter,
    )?;
    for ProgramUse { name, seconds, .. } in programs {
        ConstCounter::new(*seconds).encode(family.encode_family(&[("program", name.as_str())])?)?;
    }
    let mut family = encoder.encode_descriptor(
        "nodeguard_program_runs",
        "How often a kernel program ran, where the kernel measures it.",
        None,
        MetricType::Counter,
    )?;
    for ProgramUse { name, runs, .. } in programs {
        ConstCounter::new(*runs).encode(family.encode_family(&[("program", name.as_str())])?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: &str, entries: u64) -> MapUse {
        MapUse { name: name.into(), entries, capacity: 100 }
    }

    #[test]
    fn a_map_is_told_before_it_is_full() {
        let told: Vec<String> = weakened(&[map("PORTS", 89), map("PINHOLES", 90), map("CONNECTING", 100)]).collect();
        assert_eq!(told, ["the map PINHOLES is 90 % full (90 of 100)"]);
    }

    #[test]
    fn the_tables_say_shares_and_times() {
        let mut out = Vec::new();
        let ran = ProgramUse { name: "guard_ingress".into(), runs: 1000, seconds: 0.0002 };
        render(&[map("PORTS", 7)], &[ran], &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("PORTS   7         100        7%\n"), "{text}");
        assert!(text.contains("guard_ingress   1000   0.000     200\n"), "{text}");
    }
}
