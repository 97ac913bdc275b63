//! Owns what the guard knows of its own node: addresses and names.
//! Called by `policy/compile` (which destinations are the node's) and by `authorize` (what `node` means in a dial rule).
//! Must never resolve a name over the network: the node's facts come from the kernel and the command line.

use std::net::IpAddr;

/// The node's own addresses and names, as one reading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Every address of an interface in the node's network namespace that is neither loopback nor link-local, sorted.
    pub addresses: Vec<IpAddr>,
    /// The node's names (host name, `--node-name`, `host` identifiers), lower case: a dial to one of them is a dial to the first address.
    pub names: Vec<String>,
}
