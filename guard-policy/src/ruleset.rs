//! Owns the compiled policy: the immutable set that the kernel half and the tunnel half work from.
//! Called by `kernel/plan` (tables), `authorize` (dial rules), `status` (names and modes).
//! Must never refer back to the document: what is in force does not change when the file does.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
};

use guard_common::abi::ScopeValue;
use ipnet::IpNet;

use crate::pin::Pin;

/// Whether a denial is carried out or only counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Mode {
    /// Deny for real.
    Enforce,
    /// Count and report what would be denied; let it through.
    Audit,
}

/// A compiled policy document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// `metadata.name`.
    pub name: String,
    /// SHA-256 of the document's bytes, in hex.
    pub digest: String,
    /// `spec.mode`.
    pub mode: Mode,
    /// The rules in the order of the document. Other parts name a rule by its index here.
    pub rules: Vec<RuleSummary>,
    /// What the kernel is to hold.
    pub tables: RulesetTables,
    /// Where the control plane may go through the tunnel, in the order of the document; anything else is refused.
    pub dial: Vec<DialRule>,
    /// Which addresses are Services'.
    pub services: ServiceRange,
}

/// A rule, as far as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSummary {
    /// Unique in the document.
    pub name: String,
    /// The stricter of nothing: `Audit` where the document or the rule says so.
    pub mode: Mode,
    /// What it guards, for tables: `node 10250`, `pods 10.244.1.0/24 8080,9000-9010`.
    pub guards: String,
    /// Who it allows, for tables: `tunnel, node, 10.0.8.0/24 except 10.0.8.66/32`.
    pub allows: String,
}

/// The number of a set of listeners: 0 is the node's own, any other the pods of one set of prefixes.
pub type ScopeNumber = u32;
/// The node's own listeners.
pub const NODE_SCOPE: ScopeNumber = ScopeValue::NODE;
/// The listeners of every pod, by its cgroup.
pub const ALL_PODS_SCOPE: ScopeNumber = ScopeValue::ALL_PODS;

/// The kernel's tables, without epoch or rule slots (`kernel/plan` adds both).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RulesetTables {
    /// Destination prefixes, the longest match wins: pod prefixes, and the node's own addresses as [`NODE_SCOPE`].
    pub scopes: BTreeMap<IpNet, ScopeNumber>,
    /// Guarded ports.
    pub ports: BTreeMap<GuardedPort, PortRule>,
    /// Peer prefixes by list, the longest match wins. Within a list every prefix says the whole truth for the addresses whose
    /// longest match it is, so that one look-up decides.
    pub peers: BTreeMap<(u32, IpNet), Peer>,
    /// Cgroups by list with the rule (index) that admits them. A cgroup inside an admitted one is admitted by the same rule.
    pub callers: BTreeMap<(u32, String), usize>,
    /// Every cgroup that the policy names, with its roles (`CgroupValue::*`).
    pub cgroups: BTreeMap<String, u32>,
    /// Where a rule guards ports of every pod: how their cgroup is found.
    pub pods_cgroup: Option<PodsCgroup>,
    /// Where the companion may go and which control-plane addresses there are, the longest match wins: the set of ports, by list
    /// (`DestinationKey::*`).
    pub destinations: BTreeMap<(u32, IpNet), u32>,
    /// The ports of each set of destinations; a set without an entry has none.
    pub destination_ports: BTreeSet<DestinationPort>,
    /// Whether a UDP port is guarded.
    pub has_udp: bool,
    /// Whether nothing is denied.
    pub audit: bool,
    /// The interfaces that the edge tier is on.
    pub edge: BTreeSet<String>,
}

/// How the cgroup that pods live in is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodsCgroup {
    /// One of the places where kubelet puts it.
    Usual,
    /// As the policy says.
    Named(String),
}

/// A port that may be reached at a set of destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DestinationPort {
    /// The set.
    pub set: u32,
    /// The IP protocol number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// A guarded port, ranges spread out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuardedPort {
    /// Whose listener.
    pub scope: ScopeNumber,
    /// The IP protocol number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// Who may reach a guarded port: the union of what its rules allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRule {
    /// The peer list.
    pub list: u32,
    /// The rule (index) that a denial is counted for: the first one that guards the port.
    pub rule: usize,
    /// The first rule that allows `tunnel`.
    pub tunnel: Option<usize>,
    /// The first rule that allows `node`.
    pub node: Option<usize>,
    /// Whether a rule allows a `caller`.
    pub caller: bool,
    /// Whether every rule that guards the port only audits.
    pub audit: bool,
}

/// What the longest matching prefix of a peer list says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The rule (index) that is counted.
    pub rule: usize,
    /// Admitted or cut out.
    pub kind: PeerKind,
}

/// Whether a peer prefix admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// At least one block with this prefix inside its `cidr` and outside every `except` of it.
    Allow,
    /// Inside an `except` of every block that covers it.
    Except,
}

/// One entry of `tunnel.dial`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialRule {
    /// How messages name it: `tunnel.dial[0]`.
    pub name: String,
    /// Where to.
    pub target: DialTarget,
    /// The ports, as written.
    pub ports: Vec<RangeInclusive<u16>>,
    /// What is asked of the connection itself.
    pub demands: DialDemands,
}

/// What a dial has to hold beside its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DialDemands {
    /// Whether the first bytes must be those of a TLS handshake, both ways.
    pub tls: bool,
    /// What the backend's serving certificate must hold before it is dialled: all of these.
    pub certificates: Vec<Arc<CertificateDemand>>,
}

impl DialDemands {
    /// Adds those of another entry that names the same address and port.
    pub fn join(&mut self, other: &DialDemands) {
        self.tls |= other.tls;
        let new = other.certificates.iter().filter(|demand| !self.certificates.contains(demand));
        let new: Vec<_> = new.cloned().collect();
        self.certificates.extend(new);
    }

    /// Whether a connection that was made under `before` may lack something that is asked now.
    pub fn exceed(&self, before: &DialDemands) -> bool {
        (self.tls && !before.tls) || self.certificates.iter().any(|demand| !before.certificates.contains(demand))
    }
}

/// What a serving certificate must hold. At least one of `ca` and `pins` is there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertificateDemand {
    /// It comes from a CA in this file (PEM), is valid now, and is for the name.
    pub ca: Option<PathBuf>,
    /// The name or address that it is for; `None` means the dialled address.
    pub name: Option<String>,
    /// Its public key is one of these.
    pub pins: Vec<Pin>,
}

/// The destinations of a dial rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DialTarget {
    /// The node's own addresses.
    Node,
    /// Addresses inside these prefixes that are no Service's.
    Pods(Vec<IpNet>),
    /// Addresses of Services inside these prefixes, dialled as they are.
    Services(Vec<IpNet>),
}

impl DialRule {
    /// Whether the rule names this port.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.iter().any(|range| range.contains(&port))
    }

    /// Whether one of the rule's prefixes is exactly this address.
    pub fn names_exactly(&self, address: IpAddr) -> bool {
        match &self.target {
            DialTarget::Node | DialTarget::Services(_) => false,
            DialTarget::Pods(cidrs) => cidrs.iter().any(|cidr| *cidr == IpNet::from(address)),
        }
    }
}

/// The service range, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceRange {
    /// `tunnel.serviceCidrs`.
    pub declared: Vec<IpNet>,
    /// Where the document says nothing of that family.
    pub guessed: Option<GuessedRange>,
}

/// A range that is guessed from its first Service's address, the API server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuessedRange {
    /// That address.
    pub first: IpAddr,
    /// The largest range that it can be the first address of.
    pub range: IpNet,
}

impl ServiceRange {
    /// Whether the address is a Service's by the operator's word.
    pub fn is_declared(&self, address: IpAddr) -> bool {
        self.declared.iter().any(|cidr| cidr.contains(&address))
    }

    /// Whether the address may be a Service's.
    pub fn may_hold(&self, address: IpAddr) -> bool {
        self.is_declared(address) || self.guessed.is_some_and(|guess| guess.range.contains(&address))
    }

    /// Whether an address inside a prefix of pods is not meant by it: it is declared a Service's; or the prefix is so wide that it holds the API
    /// server's ClusterIP too, and with it the Services around that.
    pub fn is_cut_out(&self, pods: IpNet, address: IpAddr) -> bool {
        let mixed = |guess: &GuessedRange| pods.contains(&guess.first) && guess.range.contains(&address);
        self.is_declared(address) || self.guessed.as_ref().is_some_and(mixed)
    }

    /// The prefixes that either says.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.declared.iter().copied().chain(self.guessed.map(|guess| guess.range))
    }
}
