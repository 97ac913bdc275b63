//! Owns finding the files that import each other, directly or around corners.
//! Called by `imports`.
//! Must never judge a cycle: each one is reported with every import that keeps it closed.

use std::collections::{BTreeMap, BTreeSet};

use super::resolve::Edges;

/// A report for each set of files that import each other.
pub(crate) fn cycles(edges: &Edges) -> Vec<String> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (from, to) in edges.keys() {
        next.entry(from).or_default().insert(to);
    }
    let reach: BTreeMap<&str, BTreeSet<&str>> = next.keys().map(|from| (*from, reachable(from, &next))).collect();
    let reaches = |from: &str, to: &str| reach.get(from).is_some_and(|files| files.contains(to));
    let mut reported = BTreeSet::new();
    let mut found = Vec::new();
    for start in reach.keys().filter(|file| reaches(file, file)) {
        if reported.contains(start) {
            continue;
        }
        let members: BTreeSet<&str> =
            reach.keys().filter(|file| reaches(start, file) && reaches(file, start)).copied().collect();
        found.push(report(&members, edges));
        reported.extend(members);
    }
    found
}

fn reachable<'a>(from: &str, next: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut waiting: Vec<&str> = next.get(from).into_iter().flatten().copied().collect();
    while let Some(file) = waiting.pop() {
        if seen.insert(file) {
            waiting.extend(next.get(file).into_iter().flatten());
        }
    }
    seen
}

fn report(members: &BTreeSet<&str>, edges: &Edges) -> String {
    let inside = |file: &String| members.contains(file.as_str());
    let mut lines = vec![format!("{} files import each other:", members.len())];
    for ((from, to), items) in edges.iter().filter(|((from, to), _)| inside(from) && inside(to)) {
        lines.extend(items.iter().map(|(item, line)| format!("  {from}:{line}: `{item}` from {to}")));
    }
    lines.join("\n")
}
