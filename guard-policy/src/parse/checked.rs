//! Owns what a document says, read and without a place in the text: rules, the companion, the control plane.
//! Called by the other files of `parse`, which fill it, and by `tables`, which reads it.
//! Must never hold a value that was not read strictly.

use std::{collections::BTreeSet, ops::RangeInclusive};

use ipnet::IpNet;

use crate::ruleset::{DialRule, Mode, ServiceRange};

/// A rule with every value read.
pub(crate) struct GuardRule {
    pub(crate) name: String,
    pub(crate) mode: Mode,
    pub(crate) node: Vec<RangeInclusive<u16>>,
    pub(crate) pods: Vec<RangeInclusive<u16>>,
    /// Whose pod ports; none means those of every pod.
    pub(crate) cidrs: Vec<IpNet>,
    pub(crate) pods_cgroup: Option<String>,
    pub(crate) protocol: u8,
    pub(crate) tunnel: bool,
    pub(crate) from_node: bool,
    pub(crate) callers: Vec<String>,
    pub(crate) blocks: Vec<PeerBlock>,
}

impl GuardRule {
    /// Whether the rule guards ports of every pod, by its cgroup.
    pub(crate) fn all_pods(&self) -> bool {
        !self.pods.is_empty() && self.cidrs.is_empty()
    }
}

/// The companion.
pub(crate) struct Companion {
    pub(crate) cgroup: String,
    pub(crate) servers: Vec<CompanionServer>,
}

/// What the companion may reach beside the destinations of dials.
pub(crate) struct CompanionServer {
    pub(crate) cidr: IpNet,
    pub(crate) protocol: u8,
    pub(crate) ports: Vec<RangeInclusive<u16>>,
}

/// The hub rule.
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

/// What of a document goes into the tables.
pub(crate) struct CheckedDocument<'a> {
    pub(crate) rules: &'a [GuardRule],
    pub(crate) dial: &'a [DialRule],
    pub(crate) services: &'a ServiceRange,
    pub(crate) companion: Option<Companion>,
    pub(crate) control_plane: Option<ControlPlane>,
    pub(crate) audit: bool,
    pub(crate) edge: BTreeSet<String>,
}
