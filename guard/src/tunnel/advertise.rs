//! Owns advertising the pods of this node to the proxy-servers (`--advertise-pod-addresses`): a dial to a pod then comes to its own node.
//! Called by the daemons, which spawn [`follow`].
//! Must never advertise an address that the policy does not dial, nor replace the streams more often than once in `GAP`.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use guard_policy::{
    node_facts::NodeFacts,
    ruleset::{DialTarget, Ruleset},
    special::special,
};
use ipnet::IpNet;

use crate::{
    dial::connections::Connections,
    net::pods,
    tunnel::{handle::Tunnel, identifiers::Identifiers},
};

/// How often the addresses of pods are read.
const LOOK: Duration = Duration::from_secs(3);
/// The shortest time between two changes: each one replaces every stream.
const GAP: Duration = Duration::from_secs(10);
/// The largest number of advertised addresses: about 20 KiB of a header that may have 16 MiB.
const MOST: usize = 1000;

/// Advertises the pods' addresses in addition to the agent's own identifiers, and again whenever they change.
pub async fn follow(connections: Arc<Connections>, tunnel: Arc<Tunnel>, own: Identifiers) {
    let (mut advertised, mut seen) = (BTreeSet::new(), None);
    let mut changed: Option<Instant> = None;
    loop {
        match tokio::task::spawn_blocking(|| pods::addresses(Path::new("/proc")))
            .await
            .map_err(std::io::Error::other)
            .flatten()
        {
            Ok(found) => {
                let pods = chosen(&found, connections.ruleset().as_deref(), connections.node());
                // A pod that comes or goes changes several files one after the other: only a list that was read twice is advertised.
                let settled = changed.is_none() || seen.as_ref() == Some(&pods);
                if settled && pods != advertised && changed.is_none_or(|changed| changed.elapsed() >= GAP) {
                    if pods.len() > MOST {
                        tracing::error!(
                            pods = pods.len(),
                            most = MOST,
                            "too many pods to advertise all: dials to the others may go to another node"
                        );
                    }
                    let mut all = own.clone();
                    pods.iter().take(MOST).for_each(|address| all.add_address(*address));
                    tunnel.advertise(all);
                    changed = Some(Instant::now());
                    advertised.clone_from(&pods);
                }
                seen = Some(pods);
            }
            Err(error) => {
                tracing::error!(%error, "cannot read the addresses of the pods on this node; the advertised ones stay")
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The addresses that belong to pods according to the policy. A prefix of length 0 says nothing about pods.
fn chosen(found: &BTreeSet<IpAddr>, ruleset: Option<&Ruleset>, node: &NodeFacts) -> BTreeSet<IpAddr> {
    let prefixes: Vec<&IpNet> = ruleset
        .iter()
        .flat_map(|ruleset| &ruleset.dial)
        .filter_map(|rule| match &rule.target {
            DialTarget::Pods(cidrs) => Some(cidrs),
            DialTarget::Node | DialTarget::Services(_) => None,
        })
        .flatten()
        .filter(|cidr| cidr.prefix_len() > 0)
        .collect();
    let is_pods = |address: &&IpAddr| {
        special(**address).is_none()
            && !node.addresses.contains(address)
            && prefixes.iter().any(|cidr| cidr.contains(*address))
    };
    found.iter().filter(is_pods).copied().collect()
}

#[cfg(test)]
mod tests {
    use guard_policy::{compile::compile, diagnostic::Source};

    use super::*;

    #[test]
    fn what_the_policy_dials_and_is_not_the_nodes_is_advertised() {
        let text = "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {name: t}\nspec: {mode: Enforce, guard: [], tunnel: {dial: [pods: {cidrs: [10.244.1.0/24, 'fd01::/64', 127.0.0.0/8], ports: [80]}, pods: {cidrs: [0.0.0.0/0], ports: [81]}, node: {ports: [1]}]}}\n";
        let node = NodeFacts { addresses: vec!["10.244.1.1".parse().unwrap()], ..NodeFacts::default() };
        let ruleset = compile(&Source { path: "t".into(), text: text.to_owned() }, &node).unwrap().0;
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect::<BTreeSet<_>>();
        let found = ips(&["10.244.1.1", "10.244.1.2", "10.244.2.2", "127.0.0.1", "fd01::2", "fe80::1", "172.17.0.2"]);
        assert_eq!(chosen(&found, Some(&ruleset), &node), ips(&["10.244.1.2", "fd01::2"]));
        assert!(chosen(&found, None, &node).is_empty());
    }
}
