//! Owns the checked values of a document, without positions in the text: rules, the companion, the control plane.
//! Called by the other files of `parse`, which fill it, and by `compile` and `tables`, which read it.
//! Must never hold a value that was not parsed strictly.

use std::{collections::BTreeSet, ops::RangeInclusive};

use ipnet::IpNet;

use crate::ruleset::{DialRule, Mode, ServiceRange};

/// A rule of `spec.guard` with every value parsed.
pub(crate) struct GuardRule {
    pub(crate) name: String,
    pub(crate) mode: Mode,
    pub(crate) node: Vec<RangeInclusive<u16>>,
    pub(crate) pods: Vec<RangeInclusive<u16>>,
    /// The prefixes of the pods; an empty list with ports in `pods` means every pod.
    pub(crate) cidrs: Vec<IpNet>,
    pub(crate) pods_cgroup: Option<String>,
    pub(crate) protocol: u8,
    pub(crate) tunnel: bool,
    pub(crate) from_node: bool,
    pub(crate) callers: Vec<String>,
    pub(crate) blocks: Vec<PeerBlock>,
}

impl GuardRule {
    /// Whether the rule guards ports of every pod, identified by its cgroup.
    pub(crate) fn all_pods(&self) -> bool {
        !self.pods.is_empty() && self.cidrs.is_empty()
    }
}

/// `tunnel.companion`, parsed.
pub(crate) struct Companion {
    pub(crate) cgroup: String,
    pub(crate) servers: Vec<CompanionServer>,
}

/// A destination that the companion may reach in addition to those of `tunnel.dial`.
pub(crate) struct CompanionServer {
    pub(crate) cidr: IpNet,
    pub(crate) protocol: u8,
    pub(crate) ports: Vec<RangeInclusive<u16>>,
}

/// `spec.controlPlane` (the hub rule), parsed.
pub(crate) struct ControlPlane {
    pub(crate) addresses: Vec<IpNet>,
    pub(crate) ports: Vec<RangeInclusive<u16>>,
}

/// An `ipBlock` of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerBlock {
    pub(crate) rule: usize,
    pub(crate) cidr: IpNet,
    pub(crate) except: Vec<IpNet>,
}

/// The parts of a document that determine the tables.
pub(crate) struct CheckedDocument<'a> {
    pub(crate) rules: &'a [GuardRule],
    pub(crate) dial: &'a [DialRule],
    pub(crate) services: &'a ServiceRange,
    pub(crate) companion: Option<Companion>,
    pub(crate) control_plane: Option<ControlPlane>,
    pub(crate) audit: bool,
    pub(crate) edge: BTreeSet<String>,
}
