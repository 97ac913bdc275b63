//! Owns the reasons why a dial is refused: a closed list, each with a stable name and a sentence.
//! Called by `authorize` and `dial`, which refuse, and by `dial/audit` and `report`, which count and show refusals.
//! Must never contain a phrase that the proxy-server takes for another kind of failure (`timeout`, `deadline exceeded`).

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
    /// An unknown address with a port that an entry names for this node. It most likely belongs to another node.
    AnotherNode,
    /// The address of a Service whose endpoints are unknown.
    ServiceAddress,
    /// No Service of the cluster has this address and port.
    ServiceUnknown,
    /// The Service has no endpoint that accepts connections.
    ServiceNotReady,
    /// The Services of the cluster should be known, but could not be read yet.
    ServicesUnread,
    /// The backend's serving certificate does not satisfy `certificate`.
    KubeletCertificate,
    /// The connection ended elsewhere than at the address that was judged.
    Translated,
    /// A loopback address: services there trust local clients.
    Loopback,
    /// A link-local address: clouds serve credentials there.
    LinkLocal,
    /// An address at which a cloud serves metadata: there are credentials.
    CloudMetadata,
    /// An address of the NAT64 prefix for local use. It stands for an IPv4 address that the guard cannot tell.
    LocalNat64,
    /// An address of this node, which `node` does not name at this port and a wider prefix does.
    OwnAddress,
    /// A multicast or broadcast address.
    Multicast,
    /// An unspecified address, which the kernel treats as this node.
    Unspecified,
    /// Not TCP.
    Protocol,
    /// Not `host:port`.
    Malformed,
    /// The agent is draining, or it has reached its limit of dials.
    Busy,
}

impl Refusal {
    /// Every reason, in the order of the enum.
    pub const ALL: [Refusal; 20] = [
        Refusal::NoPolicy,
        Refusal::AddressNotNamed,
        Refusal::PortNotNamed,
        Refusal::AnotherNode,
        Refusal::ServiceAddress,
        Refusal::ServiceUnknown,
        Refusal::ServiceNotReady,
        Refusal::ServicesUnread,
        Refusal::KubeletCertificate,
        Refusal::Translated,
        Refusal::Loopback,
        Refusal::LinkLocal,
        Refusal::CloudMetadata,
        Refusal::LocalNat64,
        Refusal::OwnAddress,
        Refusal::Multicast,
        Refusal::Unspecified,
        Refusal::Protocol,
        Refusal::Malformed,
        Refusal::Busy,
    ];

    /// The stable name, used in the audit record, in `status` and in metrics.
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
            Refusal::Translated => "translated",
            Refusal::Loopback => "loopback",
            Refusal::LinkLocal => "link-local",
            Refusal::CloudMetadata => "cloud-metadata",
            Refusal::LocalNat64 => "local-nat64",
            Refusal::OwnAddress => "own-address",
            Refusal::Multicast => "multicast",
            Refusal::Unspecified => "unspecified",
            Refusal::Protocol => "protocol",
            Refusal::Malformed => "malformed",
            Refusal::Busy => "busy",
        }
    }
}

/// The sentence that a user of the control plane reads.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::NoPolicy => "no policy is in force on this node",
            Refusal::AddressNotNamed => "no entry of tunnel.dial names this address",
            Refusal::PortNotNamed => "tunnel.dial names this address with other ports only",
            Refusal::AnotherNode => {
                "this is not an address of this node, and tunnel.dial names the port only for this node's own addresses. If it is the address of another \
                 node, the proxy-server chose the wrong agent: start it with --proxy-strategies=destHost,default (or destHost,defaultRoute), \
                 and let every agent advertise its addresses"
            }
            Refusal::ServiceAddress => {
                "this is the address of a Service (ClusterIP), and the guard does not know which pods are behind it. Give the guard read access to \
                 EndpointSlices (deploy/services.yaml, --watch-services), so that it dials an endpoint and judges that address; or name the \
                 range in tunnel.dial as `services`, and allow the source address that the pods then see by `ipBlock`"
            }
            Refusal::ServiceUnknown => "no Service of the cluster has this address and port",
            Refusal::ServiceNotReady => "the Service has no endpoint that accepts connections",
            Refusal::ServicesUnread => {
                "the Services of the cluster could not be read yet (--watch-services): check that the API server answers and that the guard may \
                 read Services and EndpointSlices (deploy/services.yaml)"
            }
            Refusal::KubeletCertificate => "the serving certificate does not satisfy tunnel.dial",
            Refusal::Translated => {
                "something on this node translates the address (a Service with externalIPs, a hostPort, a rule of iptables or nftables), so the \
                 connection ends elsewhere than at the address that tunnel.dial names"
            }
            Refusal::Loopback => "loopback addresses are not dialled unless tunnel.dial names exactly this address",
            Refusal::LinkLocal => "link-local addresses are not dialled unless tunnel.dial names exactly this address",
            Refusal::CloudMetadata => {
                "addresses of a cloud's metadata service are not dialled unless tunnel.dial names exactly this address"
            }
            Refusal::LocalNat64 => {
                "addresses of 64:ff9b:1::/48 stand for IPv4 addresses that the guard cannot tell, and are not dialled unless tunnel.dial names \
                 exactly this address"
            }
            Refusal::OwnAddress => {
                "this is an address of this node: tunnel.dial means it only by `node` with this port, or by a prefix of exactly this address"
            }
            Refusal::Multicast => "multicast and broadcast addresses are not dialled",
            Refusal::Unspecified => {
                "an unspecified address means loopback, which is not dialled unless tunnel.dial names exactly this address"
            }
            Refusal::Protocol => "only TCP is dialled",
            Refusal::Malformed => "the address is not host:port",
            Refusal::Busy => "the guard accepts no more dials now",
        })
    }
}
