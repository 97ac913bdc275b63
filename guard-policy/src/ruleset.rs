//! Owns the ruleset, the compiled policy: it is immutable, and both the kernel half and the tunnel half work from it.
//! Called by `kernel/tables/plan` (tables), `authorize` (dial rules) and `daemon/state` (names and modes).
//! Must never refer back to the document: an edit of the file does not change the ruleset in force.

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

/// Whether denials are enforced or only counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Mode {
    /// Denies.
    Enforce,
    /// Allows, and counts and reports what would be denied.
    Audit,
}

/// A compiled policy document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// `metadata.name`.
    pub name: String,
    /// The SHA-256 of the document's bytes, in lower-case hex.
    pub digest: String,
    /// `spec.mode`.
    pub mode: Mode,
    /// The rules in the order of the document. Tables refer to a rule by its index in this list.
    pub rules: Vec<RuleSummary>,
    /// The content of the kernel's tables.
    pub tables: RulesetTables,
    /// What the control plane may dial through the tunnel, in the order of the document. Any other dial is refused.
    pub dial: Vec<DialRule>,
    /// The addresses that belong to Services.
    pub services: ServiceRange,
}

/// A rule as it is shown to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSummary {
    /// The name, unique in the document.
    pub name: String,
    /// `Audit` if the document or the rule says so, otherwise `Enforce`.
    pub mode: Mode,
    /// What the rule guards, as in `node 10250` or `pods 10.244.1.0/24 8080,9000-9010`.
    pub guards: String,
    /// Whom the rule allows, as in `tunnel, node, 10.0.8.0/24 except 10.0.8.66/32`.
    pub allows: String,
}

/// The number of a set of listeners: [`NODE_SCOPE`], [`ALL_PODS_SCOPE`], or the pods of one set of prefixes.
pub type ScopeNumber = u32;
/// The listeners of the node itself.
pub const NODE_SCOPE: ScopeNumber = ScopeValue::NODE;
/// The listeners of a pod whose addresses lie in no prefix of a rule.
pub const ALL_PODS_SCOPE: ScopeNumber = ScopeValue::ALL_PODS;
/// The listeners of a pod whose addresses are not known, at an address in no prefix of a rule.
pub const OTHER_PODS_SCOPE: ScopeNumber = ScopeValue::OTHER_PODS;

/// The content of the kernel's tables, without epochs and rule slots. `kernel/tables/plan` adds both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RulesetTables {
    /// The scope of each destination prefix: pod prefixes, and this node's addresses as [`NODE_SCOPE`]. The longest match wins.
    pub scopes: BTreeMap<IpNet, ScopeNumber>,
    /// The guarded ports and who may reach them.
    pub ports: BTreeMap<GuardedPort, PortRule>,
    /// The peer prefixes of each peer list. The longest match in a list decides alone, so that one look-up is enough.
    pub peers: BTreeMap<(u32, IpNet), Peer>,
    /// The cgroups of each peer list, with the index of the rule that admits them. Named cgroups inside an admitted cgroup are listed too.
    pub callers: BTreeMap<(u32, String), usize>,
    /// Every cgroup that the policy names, with its roles (bits of `CgroupValue`).
    pub cgroups: BTreeMap<String, u32>,
    /// How the cgroup of the pods is found, if a rule guards ports of pods.
    pub pods_cgroup: Option<PodsCgroup>,
    /// Whether a rule guards ports of every pod.
    pub all_pods: bool,
    /// The destinations of the companion and the addresses of the control plane, by list (`DestinationKey::*`), each with the number of
    /// its port set. The longest match wins.
    pub destinations: BTreeMap<(u32, IpNet), u32>,
    /// The ports of each port set. A set without an entry has no ports.
    pub destination_ports: BTreeSet<DestinationPort>,
    /// Whether any guarded port is a UDP port.
    pub has_udp: bool,
    /// Whether the whole policy only audits.
    pub audit: bool,
    /// The interfaces of the edge tier.
    pub edge: BTreeSet<String>,
}

impl RulesetTables {
    /// The scope of the longest prefix that contains the address.
    pub fn scope_at(&self, address: IpAddr) -> Option<ScopeNumber> {
        let around = |length| IpNet::new(address, length).ok().and_then(|net| self.scopes.get(&net.trunc()).copied());
        (0..=IpNet::from(address).prefix_len()).rev().find_map(around)
    }
}

/// How the cgroup of the pods is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodsCgroup {
    /// At one of the paths that kubelet uses.
    Usual,
    /// At the path that the policy names.
    Named(String),
}

/// A port of a port set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DestinationPort {
    /// The number of the port set.
    pub set: u32,
    /// The IP protocol number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// One guarded port. A range becomes one entry for each port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuardedPort {
    /// Whose listeners are guarded.
    pub scope: ScopeNumber,
    /// The IP protocol number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// Who may reach a guarded port: everyone whom one of its rules allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRule {
    /// The number of the peer list.
    pub list: u32,
    /// The index of the rule that denials are counted for: the first rule that guards the port.
    pub rule: usize,
    /// The index of the first rule that allows `tunnel`.
    pub tunnel: Option<usize>,
    /// The index of the first rule that allows `node`.
    pub node: Option<usize>,
    /// Whether a rule allows a `caller`.
    pub caller: bool,
    /// Whether all rules that guard the port only audit.
    pub audit: bool,
    /// In the scope [`OTHER_PODS_SCOPE`]: the selectors of any rule that guards this port of pods. Whatever they name may open a connection
    /// towards a pod; the pod's own rules decide.
    pub opens: Selectors,
}

/// Selectors that do not name an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selectors {
    /// `tunnel`.
    pub tunnel: bool,
    /// `node`.
    pub node: bool,
    /// `caller`.
    pub caller: bool,
}

/// The decision of one prefix of a peer list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The index of the rule that the decision is counted for.
    pub rule: usize,
    /// Whether the prefix is admitted.
    pub kind: PeerKind,
}

/// Whether a prefix of a peer list is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// Admitted: at least one block contains the prefix, and none of its exceptions does.
    Allow,
    /// Not admitted: every block that contains the prefix has an exception that contains it too.
    Except,
}

/// One entry of `tunnel.dial`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialRule {
    /// The name in messages, as in `tunnel.dial[0]`.
    pub name: String,
    /// The destinations.
    pub target: DialTarget,
    /// The ports, as ranges.
    pub ports: Vec<RangeInclusive<u16>>,
    /// The demands on the connection.
    pub demands: DialDemands,
}

/// The demands on a dialled connection, beyond its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DialDemands {
    /// Whether the first bytes in both directions must be a TLS handshake.
    pub tls: bool,
    /// What the backend's serving certificate must satisfy before the backend is dialled. All demands count.
    pub certificates: Vec<Arc<CertificateDemand>>,
}

impl DialDemands {
    /// Adds the demands of another entry that names the same address and port.
    pub fn join(&mut self, other: &DialDemands) {
        self.tls |= other.tls;
        let new = other.certificates.iter().filter(|demand| !self.certificates.contains(demand));
        let new: Vec<_> = new.cloned().collect();
        self.certificates.extend(new);
    }

    /// Whether these demands contain one that `before` does not, so that a connection made under `before` may not satisfy them.
    pub fn exceed(&self, before: &DialDemands) -> bool {
        (self.tls && !before.tls) || self.certificates.iter().any(|demand| !before.certificates.contains(demand))
    }
}

/// What a serving certificate must satisfy. At least one of `ca` and `pins` is set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertificateDemand {
    /// A PEM file of CA certificates: the certificate must be issued by one of them, be valid now and be valid for the name.
    pub ca: Option<PathBuf>,
    /// The name or address that the certificate must be valid for; `None` means the dialled address.
    pub name: Option<String>,
    /// The pins of public keys: the certificate's key must match one of them. Empty means any key.
    pub pins: Vec<Pin>,
}

/// The destinations of a dial rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DialTarget {
    /// Addresses of this node.
    Node,
    /// Addresses inside these prefixes that do not belong to a Service.
    Pods(Vec<IpNet>),
    /// Addresses of Services inside these prefixes, dialled without change.
    Services(Vec<IpNet>),
}

impl DialRule {
    /// Whether the entry names this port.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.iter().any(|range| range.contains(&port))
    }

    /// Whether one of the entry's pod prefixes is exactly this address (/32 or /128).
    pub fn names_exactly(&self, address: IpAddr) -> bool {
        match &self.target {
            DialTarget::Node | DialTarget::Services(_) => false,
            DialTarget::Pods(cidrs) => cidrs.iter().any(|cidr| *cidr == IpNet::from(address)),
        }
    }
}

/// What is known about the cluster's service range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceRange {
    /// `tunnel.serviceCidrs`.
    pub declared: Vec<IpNet>,
    /// The guessed range, if the document declares none of that address family.
    pub guessed: Option<GuessedRange>,
}

/// A service range that is guessed from its first address, the ClusterIP of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuessedRange {
    /// The ClusterIP of the API server.
    pub first: IpAddr,
    /// The largest range that can begin with this address.
    pub range: IpNet,
}

impl ServiceRange {
    /// Whether the document declares that the address belongs to a Service.
    pub fn is_declared(&self, address: IpAddr) -> bool {
        self.declared.iter().any(|cidr| cidr.contains(&address))
    }

    /// Whether the address may belong to a Service, declared or guessed.
    pub fn may_hold(&self, address: IpAddr) -> bool {
        self.is_declared(address) || self.guessed.is_some_and(|guess| guess.range.contains(&address))
    }

    /// Whether a prefix of pods does not apply to an address inside it. That is so if the address is declared a Service's, or if the prefix
    /// also contains the ClusterIP of the API server and the address lies in the range that is guessed from it.
    pub fn is_cut_out(&self, pods: IpNet, address: IpAddr) -> bool {
        let mixed = |guess: &GuessedRange| pods.contains(&guess.first) && guess.range.contains(&address);
        self.is_declared(address) || self.guessed.as_ref().is_some_and(mixed)
    }

    /// The declared and the guessed prefixes.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.declared.iter().copied().chain(self.guessed.map(|guess| guess.range))
    }
}
