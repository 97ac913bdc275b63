//! Owns what a policy is compiled for: the addresses and names of a node.
//! Called by `compile` and `authorize`; the daemon reads the facts.
//! Must never read anything itself: a document compiles the same wherever the facts come from.

use std::net::IpAddr;

/// The node's own addresses and names, as one reading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Every address of an interface in the node's network namespace that is neither loopback nor link-local, sorted.
    pub addresses: Vec<IpAddr>,
    /// The node's names (host name, `--node-name`, `host` identifiers), lower case: a dial to one of them is a dial to the first address.
    pub names: Vec<String>,
    /// Where pods reach the API server (`KUBERNETES_SERVICE_HOST`): as a rule the first address of the service range.
    pub service_host: Option<IpAddr>,
}
