//! Owns the cost of an edit: from the text of a policy to the ruleset in force, step by step, and the kernel memory that it takes.
//! Called by `main`.
//! Must never measure a switch to the ruleset that is in force already: that one writes nothing.

use std::{
    collections::BTreeMap,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lab::{
    agree::load,
    bench::{Pairs, Row, median, progress},
};
use nodeguard::kernel::tables::{apply::Apply, ruleset_maps::RulesetMaps};

use crate::{
    Amount, object,
    prefixes::{SIZES, compiled, document, prefixes},
    rivals,
};

pub(crate) fn measure(amount: Amount) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for size in SIZES {
        progress(&format!("an edit of {size} prefixes"));
        rows.extend(edit(size, amount)?);
    }
    progress("kernel memory");
    rows.extend(memory()?);
    Ok(rows)
}

fn edit(size: usize, amount: Amount) -> Result<Vec<Row>> {
    let mut ebpf = load(&object()?);
    let mut apply = Apply::new(RulesetMaps::take(&mut ebpf)?)?;
    let mut beside = Pairs::default();
    let [mut compile, mut write, mut flip, mut sweep] = <[Vec<f64>; 4]>::default();
    for round in 0..amount.rounds.min(7) {
        let nets = prefixes(false, size, round as u64);
        let text = document(&nets);
        let rival = rivals::load_set(&nets)?;
        let started = Instant::now();
        let ruleset = Arc::new(compiled(text)?);
        let is_compiled = started.elapsed();
        apply.apply(&ruleset)?;
        let took = apply.took();
        // Planning comes before the store; the sweep after it, when the ruleset is in force.
        let total = started.elapsed() - took.sweep;
        beside.add([ms(total), rival.map_or(f64::NAN, ms)]);
        compile.push(ms(is_compiled));
        write.push(ms(total - is_compiled - took.flip));
        flip.push(ms(took.flip));
        sweep.push(ms(took.sweep));
    }
    let name = |what: &str| format!("{size} CIDRs: {what}");
    let whole = beside.row(name("text to in force | nft -f of the same"), "ms", None);
    let goal = (size == 100_000).then_some(("at most", 1.0));
    Ok(vec![
        Row::beside(name("text to in force | allowed"), "ms", whole.ours, 1000.0, goal),
        whole,
        Row::alone(name("compile"), "ms", median(&compile)),
        Row::alone(name("plan and write"), "ms", median(&write)),
        Row::beside(name("the store that switches | allowed"), "ms", median(&flip), 1.0, goal),
        Row::alone(name("sweep of the old, after the switch"), "ms", median(&sweep)),
    ])
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// What the maps take: of one CIDR of each family and of one rule, and when there is none.
fn memory() -> Result<Vec<Row>> {
    const COUNT: usize = 10_000;
    const RULES: usize = 500;
    let ipset = rivals::ipset_bytes(&prefixes(false, COUNT, 1))?.map_or(f64::NAN, |bytes| bytes / COUNT as f64);
    let of_cidr = |v6: bool| Ok::<_, anyhow::Error>(grown(&document(&prefixes(v6, COUNT, 1)))? / COUNT as f64);
    let rules: String = (0..RULES)
        .map(|number| {
            let port = 20_000 + number;
            format!("    - name: rule-{number}\n      node: {{ports: [{port}]}}\n      allow: [tunnel: {{}}]\n")
        })
        .collect();
    let with_rules = document([]).replacen("    - name: kubelet", &format!("{rules}    - name: kubelet"), 1);
    let of_rule = grown(&with_rules)? / RULES as f64;
    let empty = load(&object()?);
    let fixed = maps_bytes()? / 1_048_576.0;
    drop(empty);
    Ok(vec![
        Row::beside("kernel memory of an IPv4 CIDR | in an ipset", "B", of_cidr(false)?, ipset, None),
        Row::alone("kernel memory of an IPv6 CIDR", "B", of_cidr(true)?),
        Row::alone("kernel memory of a rule with a port", "B", of_rule),
        Row::alone("kernel memory of all maps, empty", "MiB", fixed),
    ])
}

/// How many bytes of map memory a document takes beyond an empty one.
fn grown(text: &str) -> Result<f64> {
    let mut ebpf = load(&object()?);
    let mut apply = Apply::new(RulesetMaps::take(&mut ebpf)?)?;
    apply.apply(&Arc::new(compiled(document([]))?))?;
    let before = maps_bytes()?;
    apply.apply(&Arc::new(compiled(text.to_owned())?))?;
    Ok(maps_bytes()? - before)
}

/// The memory of every map that this process holds, as the kernel accounts for it, each once.
fn maps_bytes() -> Result<f64> {
    let mut maps: BTreeMap<String, f64> = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo")?.flatten() {
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id.to_owned(), bytes.parse().context("memlock")?);
        }
    }
    Ok(maps.values().sum())
}
