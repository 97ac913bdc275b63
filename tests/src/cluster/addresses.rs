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

impl Addresses {
    fn new(v6: bool) -> Addresses {
        let of = |v4, of_v6| if v6 { of_v6 } else { v4 };
        Addresses {
            family: of("ip", "ip6"),
            control: of("10.0.0.1", "fd00::1"),
            control_direct: of("10.0.0.9", "fd00::9"),
            node: of("10.0.0.2", "fd00::2"),
            second: of("10.0.0.3", "fd00::3"),
            neighbour: of("10.0.0.4", "fd00::4"),
            scraper: of("10.0.8.5", "fd00:0:0:8::5"),
            prefix: if v6 { 48 } else { 16 },
            whole: if v6 { 128 } else { 32 },
            pods: of("10.244.0.0/16", "fd00:244::/32"),
            pods_of: [of("10.244.1.0/24", "fd00:244:1::/64"), of("10.244.2.0/24", "fd00:244:2::/64")],
            services: of("10.96.0.0/16", "fd00:96::/112"),
            api_service: of("10.96.0.1", "fd00:96::1"),
            everything: of("0.0.0.0/0", "::/0"),
            loopback: of("127.0.0.1", "::1"),
            link_local: of("169.254.169.254", "fe80::a9fe:a9fe"),
            forwarding: of("ipv4/ip_forward", "ipv6/conf/all/forwarding"),
        }
    }

    /// Whether the cluster has IPv6 alone.
    pub fn v6(&self) -> bool {
        self.family == "ip6"
    }
}

static CHOSEN: OnceLock<Addresses> = OnceLock::new();

/// Chooses the family, once.
pub fn choose(v6: bool) -> Result<()> {
    CHOSEN.set(Addresses::new(v6)).ok().context("the family is chosen already")
}

/// The cluster's addresses: of IPv4 unless the other family was chosen.
pub fn at() -> &'static Addresses {
    CHOSEN.get_or_init(|| Addresses::new(false))
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
