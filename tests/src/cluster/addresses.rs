//! Owns the addresses of a cluster: of IPv4, or of IPv6 alone.
//! Called by every other part of the cluster lab; the program chooses the family once, before anything stands.
//! Must never hold an address of the machine's own networks: the cluster's namespaces are connected to nothing else.

use std::{net::SocketAddr, sync::OnceLock};

use anyhow::{Context, Result};

/// Who has which address.
pub struct Addresses {
    /// The family in the words of nft: `ip` or `ip6`.
    pub family: &'static str,
    /// The control plane's address.
    pub control: &'static str,
    /// Its other address, from which its packet filter lets connections out: attempts past the tunnel use it.
    pub control_direct: &'static str,
    /// The first node's.
    pub node: &'static str,
    /// The second node's.
    pub second: &'static str,
    /// A host beside the nodes.
    pub neighbour: &'static str,
    /// Its other address, which the policy names.
    pub scraper: &'static str,
    /// The prefix length of the network that all of these are in.
    pub prefix: u8,
    /// The length of an address in bits.
    pub whole: u8,
    /// The network of all pods.
    pub pods: &'static str,
    /// The networks of the pods of the two nodes.
    pub pods_of: [&'static str; 2],
    /// The network of the Services.
    pub services: &'static str,
    /// The API server's own Service.
    pub api_service: &'static str,
    /// The default route.
    pub everything: &'static str,
    /// Loopback.
    pub loopback: &'static str,
    /// A link-local address: the cloud's metadata, or what looks like it.
    pub link_local: &'static str,
    /// The setting below /proc/sys/net that makes a namespace forward.
    pub forwarding: &'static str,
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
pub fn choose(v6: bool) -> Result<()> {
    V6_ALONE.set(v6).ok().context("the family is chosen already")
}

/// The cluster's addresses.
pub fn at() -> &'static Addresses {
    if V6_ALONE.get() == Some(&true) { &V6 } else { &V4 }
}

impl Addresses {
    /// Whether the cluster has IPv6 alone.
    pub fn v6(&self) -> bool {
        self.family == "ip6"
    }
}

/// A port at an address.
pub(super) fn socket(address: &str, port: u16) -> Result<SocketAddr> {
    let address = address.parse().with_context(|| format!("{address} is not an address"))?;
    Ok(SocketAddr::new(address, port))
}

/// A text with addresses in the place of their names, such as `<control>`.
pub fn filled(text: &str) -> String {
    let at = at();
    let whole = at.whole.to_string();
    [
        ("<family>", at.family),
        ("<control>", at.control),
        ("<control direct>", at.control_direct),
        ("<node>", at.node),
        ("<scraper>", at.scraper),
        ("<whole>", &whole),
        ("<pods>", at.pods),
        ("<services>", at.services),
        ("<everything>", at.everything),
        ("<loopback>", at.loopback),
        ("<link-local>", at.link_local),
        ("<address kind>", if at.v6() { "ipv6" } else { "ipv4" }),
    ]
    .iter()
    .fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
}
