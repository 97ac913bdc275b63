//! Owns the order of the rooms of the daemon's crate, and what an import must not do in it.
//! Called by `imports`.
//! Must never judge a file that is in no room.

use super::resolve::Edges;

/// The crate that has rooms.
const HOUSE: &str = "guard/src/";

/// Each room imports only from rooms that stand to its right.
const ROOMS: [&str; 11] =
    ["main", "daemon", "cli", "report", "tunnel", "dial", "cluster", "kernel", "net", "wire", "sys"];

/// The imports that go against the order of the rooms.
pub(crate) fn upward(edges: &Edges) -> Vec<String> {
    let mut found = Vec::new();
    for ((from, to), items) in edges {
        let (Some(room), Some(above)) = (room(from), room(to)) else { continue };
        if above < room {
            let (room, above) = (ROOMS[room], ROOMS[above]);
            found.extend(items.iter().map(|(item, line)| {
                format!("{from}:{line}: upward import of `{item}` from {to}: `{room}` must not know `{above}`")
            }));
        }
    }
    found
}

/// The place of a file's room in the order. The root of the crate stands above all of them.
fn room(file: &str) -> Option<usize> {
    let name = file.strip_prefix(HOUSE)?.split('/').next()?.trim_end_matches(".rs");
    let name = if name == "lib" { "main" } else { name };
    ROOMS.iter().position(|room| *room == name)
}
