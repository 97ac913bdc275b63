//! Owns what is told of the edge tier: a row for each interface, in `status`, in the metrics and where it is missing.
//! Called by `app`, which holds it, by `snapshot`, `status` and `metrics`.
//! Must never take the tier for the guard: it is the first line against floods, and nothing depends on it.

use std::{
    collections::BTreeSet,
    fmt,
    io::{self, Write},
};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};

use crate::{kernel::links::edge_hooks::EdgeLink, report::table::Table};

/// What is so now: what was found last, and what the pins say by now.
pub fn now(found: &[EdgeLink], pinned: Vec<EdgeLink>) -> Vec<EdgeLink> {
    let wanted: BTreeSet<&str> = found.iter().map(|link| link.interface.as_str()).collect();
    let live = |link: &EdgeLink| pinned.iter().find(|pinned| pinned.interface == link.interface).cloned();
    let with_note = |link: &EdgeLink| match live(link) {
        Some(live) => EdgeLink { note: if live.attached { link.note.clone() } else { "detached".to_owned() }, ..live },
        None if link.attached => EdgeLink { attached: false, note: "detached".to_owned(), ..link.clone() },
        None => link.clone(),
    };
    let left = pinned.iter().filter(|pinned| !wanted.contains(pinned.interface.as_str())).cloned();
    found.iter().map(with_note).chain(left).collect()
}

/// What of it weakens protection, a sentence each.
pub fn weakened(links: &[EdgeLink]) -> impl Iterator<Item = String> {
    links.iter().filter(|link| !link.attached).map(|EdgeLink { interface, note, .. }| {
        format!("the edge tier is not on {interface} ({note}): a flood there costs more; what is denied stays denied")
    })
}

/// The table of `status`.
pub fn render(links: &[EdgeLink], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&["EDGE", "ATTACHED", "HOOK", "LINK", "ID", "NOTE"]);
    let number = |id: Option<u32>| id.map_or_else(String::new, |id| id.to_string());
    for EdgeLink { interface, hook, attached, link_id, program_id, note } in links {
        let attached = if *attached { "yes" } else { "NO" };
        let cells = [attached, hook].map(str::to_owned);
        table.row([interface.clone()].into_iter().chain(cells).chain([
            number(*link_id),
            number(*program_id),
            note.clone(),
        ]));
    }
    table.write(out)
}

/// The metric.
pub fn encode(links: &[EdgeLink], encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(
        "nodeguard_edge_attached",
        "1 where the edge tier is on the interface, with the hook that it is attached by.",
        None,
        MetricType::Gauge,
    )?;
    for EdgeLink { interface, hook, attached, .. } in links {
        let labels = [("interface", interface.as_str()), ("hook", hook.as_str())];
        ConstGauge::new(i64::from(*attached)).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(interface: &str, attached: bool, note: &str) -> EdgeLink {
        EdgeLink { interface: interface.into(), hook: "tcx".into(), attached, note: note.into(), ..EdgeLink::default() }
    }

    #[test]
    fn what_is_detached_since_the_last_look_is_told() {
        let found = [link("a", true, "n"), link("b", true, ""), link("c", false, "gone")];
        let pinned = vec![link("a", true, ""), link("b", false, ""), link("x", true, "")];
        let now = now(&found, pinned);
        let told: Vec<(&str, bool, &str)> =
            now.iter().map(|link| (link.interface.as_str(), link.attached, link.note.as_str())).collect();
        assert_eq!(told, [("a", true, "n"), ("b", false, "detached"), ("c", false, "gone"), ("x", true, "")]);
        assert_eq!(weakened(&now).count(), 2);
    }
}
