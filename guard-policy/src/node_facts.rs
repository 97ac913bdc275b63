//! Owns the facts of a node that a policy is compiled for: its addresses and names.
//! Called by `compile` and `authorize`; `sys/node_facts` reads the facts from the machine.
//! Must never read the machine itself: the same facts give the same ruleset everywhere.

use std::net::IpAddr;

use crate::special::stands_for;

/// The addresses and names of a node, read at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The addresses of the interfaces in the node's network namespace, sorted, without loopback and link-local addresses.
    pub addresses: Vec<IpAddr>,
    /// The names of the node in lower case: host name, `--node-name`, `host` identifiers. A dial to one of them goes to the first address.
    pub names: Vec<String>,
    /// The address at which pods reach the API server (`KUBERNETES_SERVICE_HOST`). It is normally the first address of the service range.
    pub service_host: Option<IpAddr>,
}

impl NodeFacts {
    /// Whether an address is one of the node's own, or an IPv6 address that stands for one.
    pub fn owns(&self, address: IpAddr) -> bool {
        let own = |address: IpAddr| self.addresses.contains(&address);
        own(address) || stands_for(address).is_some_and(|address| own(address.into()))
    }
}
