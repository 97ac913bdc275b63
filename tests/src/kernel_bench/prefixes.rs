//! Owns the policies that are measured: so many prefixes as a big allow-list has them, and addresses inside and outside of them.
//! Called by every part of the kernel bench.
//! Must never be the same list twice in a row where a switch is measured: the same ruleset is not written again.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Result, anyhow};
use guard_policy::{compile::compile, diagnostic::Source, node_facts::NodeFacts, ruleset::Ruleset};
use ipnet::IpNet;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// The sizes at which costs are shown.
pub(crate) const SIZES: [usize; 4] = [1, 1_000, 10_000, 100_000];
/// The guarded ports: this one, and the next.
pub(crate) const PORT: u16 = 10_270;

/// So many prefixes of one family, of all lengths that allow-lists have, nowhere near 10.0.0.0/8.
pub(crate) fn prefixes(v6: bool, count: usize, seed: u64) -> Vec<IpNet> {
    let mut rng = StdRng::seed_from_u64(seed ^ u64::from(v6));
    let mut nets = BTreeSet::new();
    while nets.len() < count {
        let length = if v6 { rng.random_range(48..=128) } else { rng.random_range(18..=32) };
        nets.insert(IpNet::new_assert(address(&mut rng, v6), length).trunc());
    }
    nets.into_iter().collect()
}

/// An address of 64.0.0.0/2 or of 2001:db8::/32.
fn address(rng: &mut StdRng, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::from((0x2001_0db8_u128 << 96) | (rng.random::<u128>() >> 32)).into()
    } else {
        Ipv4Addr::from(rng.random::<u32>() >> 2 | 1 << 30).into()
    }
}

/// Addresses that some of the prefixes hold.
pub(crate) fn inside(nets: &[IpNet], count: usize) -> Vec<IpAddr> {
    let step = (nets.len() / count).max(1);
    nets.iter().step_by(step).map(IpNet::addr).cycle().take(count).collect()
}

/// Addresses of the same range that none of them holds.
pub(crate) fn outside(nets: &[IpNet], v6: bool, count: usize) -> Vec<IpAddr> {
    let mut rng = StdRng::seed_from_u64(7);
    let all = std::iter::repeat_with(|| address(&mut rng, v6));
    all.filter(|address| !nets.iter().any(|net| net.contains(address))).take(count).collect()
}

/// The document that admits these prefixes, and the tunnel, to [`PORT`].
pub(crate) fn document<'a>(nets: impl IntoIterator<Item = &'a IpNet>) -> String {
    let allowed: String = nets.into_iter().map(|net| format!("        - ipBlock: {{cidr: '{net}'}}\n")).collect();
    format!(
        "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: bench}}\nspec:\n  mode: Enforce\n  guard:\n    - name: kubelet\n      node: {{ports: ['{PORT}-{}']}}\n      allow:\n        - tunnel: {{}}\n{allowed}  tunnel: {{dial: []}}\n",
        PORT + 1
    )
}

/// Compiles a document by the product's own way.
pub(crate) fn compiled(text: String) -> Result<Ruleset> {
    let node = NodeFacts {
        addresses: vec![lab::net::Who::Node.v4().into()],
        names: vec!["node".into()],
        ..NodeFacts::default()
    };
    let source = Source { path: PathBuf::from("bench.yaml"), text };
    compile(&source, &node).map(|(ruleset, _)| ruleset).map_err(|findings| anyhow!(source.render(&findings, false)))
}
