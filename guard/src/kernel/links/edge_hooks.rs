//! Owns where the edge tier can be attached, and what the daemon holds of it.
//! Called by `load`, which keeps it, and by `edge_tier`, which makes it hold.
//! Must never decide where to attach: that is `edge_tier`'s.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernel::syscalls;

/// Where a link is attached, in the order in which it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hook {
    /// XDP in the driver: before the kernel makes a packet of a frame.
    Xdp,
    /// The first hook behind the driver (6.6).
    Tcx,
    /// XDP behind the driver, for kernels without tcx: large packets are copied for it.
    XdpGeneric,
}

impl Hook {
    pub(crate) const ALL: [Hook; 3] = [Hook::Xdp, Hook::Tcx, Hook::XdpGeneric];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Hook::Xdp => "xdp",
            Hook::Tcx => "tcx",
            Hook::XdpGeneric => "xdp-generic",
        }
    }

    pub(crate) const fn program(self) -> &'static str {
        match self {
            Hook::Xdp | Hook::XdpGeneric => XDP,
            Hook::Tcx => TCX,
        }
    }

    /// Attach type and flags (`XDP_FLAGS_DRV_MODE`, `BPF_F_BEFORE`, `XDP_FLAGS_SKB_MODE`).
    pub(crate) const fn attach_type(self) -> (u32, u32) {
        match self {
            Hook::Xdp => (syscalls::BPF_XDP, 1 << 2),
            Hook::Tcx => (syscalls::BPF_TCX_INGRESS, 1 << 3),
            Hook::XdpGeneric => (syscalls::BPF_XDP, 1 << 1),
        }
    }
}

pub(crate) const XDP: &str = "guard_edge";

pub(crate) const TCX: &str = "guard_edge_tc";

/// The programs of the edge tier.
pub const EDGE_PROGRAMS: [&str; 2] = [XDP, TCX];

/// What the daemon holds of the edge tier.
#[derive(Default)]
pub(crate) struct EdgeHandles {
    pub(crate) links: BTreeMap<String, HookLink>,
    /// The ids of the loaded programs, by name.
    pub(crate) programs: BTreeMap<&'static str, u32>,
    /// What was said of an interface last: it is logged once.
    pub(crate) said: BTreeMap<String, String>,
}

pub(crate) struct HookLink {
    pub(crate) fd: OwnedFd,
    pub(crate) hook: Hook,
    pub(crate) index: u32,
}

/// The edge tier on one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EdgeLink {
    /// The interface, as the policy names it.
    pub interface: String,
    /// `xdp`, `tcx` or `xdp-generic`; empty if it is not attached.
    pub hook: String,
    /// Whether it is attached.
    pub attached: bool,
    /// The link's id.
    pub link_id: Option<u32>,
    /// The id of the program in the link.
    pub program_id: Option<u32>,
    /// Why it is not attached, or why it uses a fallback hook.
    pub note: String,
}

impl EdgeLink {
    /// The links as they are now: the daemon's last look, corrected by the pins.
    pub fn now(found: &[EdgeLink], pinned: Vec<EdgeLink>) -> Vec<EdgeLink> {
        let wanted: BTreeSet<&str> = found.iter().map(|link| link.interface.as_str()).collect();
        let live = |link: &EdgeLink| pinned.iter().find(|pinned| pinned.interface == link.interface).cloned();
        let with_note = |link: &EdgeLink| match live(link) {
            Some(live) => {
                EdgeLink { note: if live.attached { link.note.clone() } else { "detached".to_owned() }, ..live }
            }
            None if link.attached => EdgeLink { attached: false, note: "detached".to_owned(), ..link.clone() },
            None => link.clone(),
        };
        let left = pinned.iter().filter(|pinned| !wanted.contains(pinned.interface.as_str())).cloned();
        found.iter().map(with_note).chain(left).collect()
    }
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
        let now = EdgeLink::now(&found, pinned);
        let told: Vec<(&str, bool, &str)> =
            now.iter().map(|link| (link.interface.as_str(), link.attached, link.note.as_str())).collect();
        assert_eq!(told, [("a", true, "n"), ("b", false, "detached"), ("c", false, "gone"), ("x", true, "")]);
    }
}
