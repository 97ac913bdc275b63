//! Owns why a dial is refused: a closed list with a stable name and a sentence each.
//! Called by `authorize`, by the dial that is refused, and by whatever counts or reports refusals.
//! Must never hold a word that the proxy-server reads as another kind of failure (`timeout`, `deadline exceeded`).

use std::fmt;

/// Why a dial is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No policy is in force.
    NoPolicy,
    /// No entry of `tunnel.dial` names the address.
    AddressNotNamed,
    /// An entry names the address, but not the port.
    PortNotNamed,
    /// Nobody's address that is known here, at a port that an entry names for this node's own: most likely another node's.
    AnotherNode,
    /// A Service's address, and nobody says which pods are behind it.
    ServiceAddress,
    /// The Services of the cluster are known, and none has this address and port.
    ServiceUnknown,
    /// A Service without an endpoint that takes connections.
    ServiceNotReady,
    /// The Services of the cluster are to be known, and were never read.
    ServicesUnread,
    /// What the backend shows is not what `certificate` asks for.
    KubeletCertificate,
    /// Loopback, which reaches what trusts its own node.
    Loopback,
    /// Link-local, which is where clouds serve credentials.
    LinkLocal,
    /// A multicast or broadcast address.
    Multicast,
    /// An unspecified address, which means this node.
    Unspecified,
    /// Not TCP.
    Protocol,
    /// Not `host:port`.
    Malformed,
    /// The agent is draining or at its limit of dials.
    Busy,
}

impl Refusal {
    /// Every one.
    pub const ALL: [Refusal; 16] = [
        Refusal::NoPolicy,
        Refusal::AddressNotNamed,
        Refusal::PortNotNamed,
        Refusal::AnotherNode,
        Refusal::ServiceAddress,
        Refusal::ServiceUnknown,
        Refusal::ServiceNotReady,
        Refusal::ServicesUnread,
        Refusal::KubeletCertificate,
        Refusal::Loopback,
        Refusal::LinkLocal,
        Refusal::Multicast,
        Refusal::Unspecified,
        Refusal::Protocol,
        Refusal::Malformed,
        Refusal::Busy,
    ];

    /// The stable name: a word in the audit line, in `status` and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::NoPolicy => "no-policy",
            Refusal::AddressNotNamed => "address-not-named",
            Refusal::PortNotNamed => "port-not-named",
            Refusal::AnotherNode => "another-node",
            Refusal::ServiceAddress => "service-address",
            Refusal::ServiceUnknown => "service-unknown",
            Refusal::ServiceNotReady => "service-not-ready",
            Refusal::ServicesUnread => "services-unread",
            Refusal::KubeletCertificate => "kubelet-certificate",
            Refusal::Loopback => "loopback",
            Refusal::LinkLocal => "link-local",
            Refusal::Multicast => "multicast",
            Refusal::Unspecified => "unspecified",
            Refusal::Protocol => "protocol",
            Refusal::Malformed => "malformed",
            Refusal::Busy => "busy",
        }
    }
}

/// What the control plane's user reads. Free of words that the server would take for another kind of failure.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::NoPolicy => "no policy is in force on this node",
            Refusal::AddressNotNamed => "no entry of tunnel.dial names this address",
            Refusal::PortNotNamed => "tunnel.dial names this address with other ports only",
            Refusal::AnotherNode => {
                "this is no address of this node, and tunnel.dial names the port for this node's own addresses: if it is another node's, \
                 the proxy-server chose the wrong agent; start it with --proxy-strategies=destHost,default (or destHost,defaultRoute), \
                 and let every agent advertise its addresses"
            }
            Refusal::ServiceAddress => {
                "this is a Service's address (ClusterIP), and the guard does not know which pods are behind it: give it read access to \
                 EndpointSlices (deploy/services.yaml, --watch-services), so that it picks one and judges its address; or name the range \
                 in tunnel.dial as `services`, and allow what the pods then see by `ipBlock`"
            }
            Refusal::ServiceUnknown => "no Service of the cluster has this address and port",
            Refusal::ServiceNotReady => "the Service has no endpoint that takes connections",
            Refusal::ServicesUnread => {
                "the Services of the cluster were not read yet (--watch-services): does the API server answer, and does it let the guard \
                 read Services and EndpointSlices (deploy/services.yaml)"
            }
            Refusal::KubeletCertificate => "the serving certificate is not the one that tunnel.dial asks for",
            Refusal::Loopback => "loopback addresses are not dialled unless tunnel.dial names exactly this one",
            Refusal::LinkLocal => "link-local addresses are not dialled unless tunnel.dial names exactly this one",
            Refusal::Multicast => "multicast and broadcast addresses are not dialled",
            Refusal::Unspecified => {
                "unspecified addresses mean loopback, which is not dialled unless tunnel.dial names exactly this one"
            }
            Refusal::Protocol => "only tcp is dialled",
            Refusal::Malformed => "the address is not host:port",
            Refusal::Busy => "the guard takes no more dials now",
        })
    }
}
