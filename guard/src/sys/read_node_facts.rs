//! Owns reading the facts of this node: addresses, names, and the one Service address that kubelet gives to every pod.
//! Called by the command line; `guard-policy` judges with them.
//! Must never resolve a name over the network: the node's facts come from the kernel, the command line and kubelet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use guard_policy::node_facts::NodeFacts;

/// kube-proxy in IPVS mode gives the node every ClusterIP on this interface: they are not the node's own.
const IPVS: &str = "kube-ipvs0";

/// Reads the interfaces of the caller's network namespace, and adds the host name to the given names.
pub fn read(names: &[String]) -> std::io::Result<NodeFacts> {
    let mut addresses: Vec<IpAddr> = nix::ifaddrs::getifaddrs()?
        .filter(|interface| interface.interface_name != IPVS)
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
        })
        .filter(|address| is_reachable(*address))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    let host = nix::unistd::gethostname()?;
    let mut names: Vec<String> =
        names.iter().cloned().chain(host.into_string()).map(|name| name.to_lowercase()).collect();
    names.sort_unstable();
    names.dedup();
    let service_host = std::env::var("KUBERNETES_SERVICE_HOST").ok().and_then(|host| host.parse().ok());
    Ok(NodeFacts { addresses, names, service_host })
}

/// Whether others can reach the node by this address.
fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !(address.is_loopback() || address.is_link_local() || address == Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(address) => {
            !(address.is_loopback() || address.is_unicast_link_local() || address == Ipv6Addr::UNSPECIFIED)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_link_local_are_no_addresses_of_the_node() {
        for text in ["127.0.0.1", "127.0.1.1", "169.254.1.1", "0.0.0.0", "::1", "fe80::1", "::"] {
            assert!(!is_reachable(text.parse().unwrap()), "{text}");
        }
        for text in ["10.0.0.1", "fd00::1", "2001:db8::1"] {
            assert!(is_reachable(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn names_are_lower_case_and_hold_the_host_name() {
        let facts = read(&["Worker-1".to_owned(), "worker-1".to_owned()]).unwrap();
        let host = nix::unistd::gethostname().unwrap().into_string().unwrap().to_lowercase();
        assert!(facts.names.contains(&host));
        assert_eq!(facts.names.iter().filter(|name| *name == "worker-1").count(), 1);
    }
}
