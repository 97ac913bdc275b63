//! Owns the addresses of a cluster: of IPv4, or of IPv6 alone.
//! Called by every other part; `main` chooses once, before anything stands.
//! Must never hold an address of the machine's own networks: the cluster's namespaces are connected to nothing else.

use std::{net::SocketAddr, sync::OnceLock};

use anyhow::{Context, Result};

/// Who has which address.
pub(crate) struct Addresses {
    /// How the family is called by nft and CNI: `ip` or `ip6`.
    pub(crate) family: &'static str,
    /// The control plane's address.
    pub(crate) control: &'static str,
    /// Its other one, from which its packet filter lets connections out: what tries the node directly uses it.
    pub(crate) control_direct: &'static str,
    /// The first node's.
    pub(crate) node: &'static str,
    /// The second node's.
    pub(crate) second: &'static str,
    /// A host beside the nodes.
    pub(crate) neighbour: &'static str,
    /// Its other address, which the policy names.
    pub(crate) scraper: &'static str,
    /// How much of these is the network that all of them are in.
    pub(crate) prefix: u8,
    /// How long a whole address is.
    pub(crate) whole: u8,
    /// Every pod's.
    pub(crate) pods: &'static str,
    /// The pods of the two nodes.
    pub(crate) pods_of: [&'static str; 2],
    /// Services have addresses in it.
    pub(crate) services: &'static str,
    /// The API server's own service.
    pub(crate) api_service: &'static str,
    /// Everything.
    pub(crate) everything: &'static str,
    /// This host, to itself.
    pub(crate) loopback: &'static str,
    /// An address that means another machine on each link: the cloud's metadata, or what has its shape.
    pub(crate) link_local: &'static str,
    /// The switch that makes a namespace forward.
    pub(crate) forwarding: &'static str,
}

const V4: Addresses = Addresses {
    family: "ip",
    control: "10.0.0.1",
    control_direct: "10.0.0.9",
    node: "10.0.0.2",
    second: "10.0.0.3",
    neighbour: "10.0.0.4",
    scraper: "10.0.8.5",
    prefix: 16,
    whole: 32,
    pods: "10.244.0.0/16",
    pods_of: ["10.244.1.0/24", "10.244.2.0/24"],
    services: "10.96.0.0/16",
    api_service: "10.96.0.1",
    everything: "0.0.0.0/0",
    loopback: "127.0.0.1",
    link_local: "169.254.169.254",
    forwarding: "ipv4/ip_forward",
};

const V6: Addresses = Addresses {
    family: "ip6",
    control: "fd00::1",
    control_direct: "fd00::9",
    node: "fd00::2",
    second: "fd00::3",
    neighbour: "fd00::4",
    scraper: "fd00:0:0:8::5",
    prefix: 48,
    whole: 128,
    pods: "fd00:244::/32",
    pods_of: ["fd00:244:1::/64", "fd00:244:2::/64"],
    services: "fd00:96::/112",
    api_service: "fd00:96::1",
    everything: "::/0",
    loopback: "::1",
    link_local: "fe80::a9fe:a9fe",
    forwarding: "ipv6/conf/all/forwarding",
};

static V6_ALONE: OnceLock<bool> = OnceLock::new();

/// Chooses the family, once.
pub(crate) fn choose(v6: bool) -> Result<()> {
    V6_ALONE.set(v6).ok().context("the family is chosen already")
}

/// The cluster's addresses.
pub(crate) fn at() -> &'static Addresses {
    if V6_ALONE.get() == Some(&true) { &V6 } else { &V4 }
}

/// A port at an address.
pub(crate) fn socket(address: &str, port: u16) -> Result<SocketAddr> {
    let address = address.parse().with_context(|| format!("{address} is no address"))?;
    Ok(SocketAddr::new(address, port))
}
