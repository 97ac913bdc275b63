//! Owns peer lists: it turns the `ipBlock`s of the rules that guard a port into prefixes whose longest match decides alone.
//! Called by `build`.
//! Must never change the meaning: an address is admitted if and only if a block contains it and no exception of that block does.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::{
    parse::checked::PeerBlock,
    ruleset::{Peer, PeerKind},
};

/// The blocks and exceptions that start at a prefix.
#[derive(Default)]
struct PrefixStart {
    blocks: Vec<usize>,
    exceptions: Vec<usize>,
}

/// A prefix that contains the current one, with the changes that it made to the sets.
struct OpenPrefix {
    net: IpNet,
    covering: Vec<usize>,
    admitting: Vec<usize>,
    excepted: Vec<usize>,
}

/// Walks the prefixes once in sorted order, which is the order of a depth-first tree walk. Each prefix inherits the sets of the prefixes that
/// contain it and adds its own blocks and exceptions; its changes are undone when the walk leaves it.
pub(crate) fn peers(blocks: &[PeerBlock]) -> BTreeMap<IpNet, Peer> {
    let mut begins: BTreeMap<IpNet, PrefixStart> = BTreeMap::new();
    for (index, block) in blocks.iter().enumerate() {
        begins.entry(block.cidr).or_default().blocks.push(index);
        for except in &block.except {
            begins.entry(*except).or_default().exceptions.push(index);
        }
    }
    let (mut covering, mut admitting) = (BTreeSet::new(), BTreeSet::new());
    let mut path: Vec<OpenPrefix> = Vec::new();
    let mut peers = BTreeMap::new();
    for (net, begin) in begins {
        while let Some(frame) = path.pop_if(|frame| !frame.net.contains(&net)) {
            admitting.extend(frame.excepted);
            admitting.retain(|index| !frame.admitting.contains(index));
            covering.retain(|index| !frame.covering.contains(index));
        }
        let mut frame = OpenPrefix { net, covering: Vec::new(), admitting: Vec::new(), excepted: Vec::new() };
        for index in begin.blocks {
            covering.insert(index);
            admitting.insert(index);
            frame.covering.push(index);
            frame.admitting.push(index);
        }
        frame.excepted.extend(begin.exceptions.into_iter().filter(|index| admitting.remove(index)));
        path.push(frame);
        let rule = |index: &usize| blocks.get(*index).map(|block| block.rule);
        let peer = match (admitting.first().and_then(rule), covering.first().and_then(rule)) {
            (Some(rule), _) => Peer { rule, kind: PeerKind::Allow },
            (None, Some(rule)) => Peer { rule, kind: PeerKind::Except },
            // An exception outside every block excludes nothing.
            (None, None) => continue,
        };
        peers.insert(net, peer);
    }
    peers
}

/// The peers that two lists both admit.
pub(crate) fn common(one: &BTreeMap<IpNet, Peer>, other: &BTreeMap<IpNet, Peer>) -> BTreeMap<IpNet, Peer> {
    let longest = |list: &BTreeMap<IpNet, Peer>, net: &IpNet| {
        let around = |length| IpNet::new(net.addr(), length).ok().and_then(|net| list.get(&net.trunc()).copied());
        (0..=net.prefix_len()).rev().find_map(around)
    };
    let allowed = |peer: &Option<Peer>| peer.is_some_and(|peer| peer.kind == PeerKind::Allow);
    let mut both = BTreeMap::new();
    for net in one.keys().chain(other.keys()) {
        let peer = match (longest(one, net), longest(other, net)) {
            (first @ Some(_), second) if allowed(&first) && allowed(&second) => first,
            (first, second) => first.or(second).map(|peer| Peer { kind: PeerKind::Except, ..peer }),
        };
        both.extend(peer.map(|peer| (*net, peer)));
    }
    both
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    /// What the blocks mean for one address.
    fn oracle(blocks: &[PeerBlock], address: IpAddr) -> Option<Peer> {
        let holds = |block: &&PeerBlock| block.cidr.contains(&address);
        let admits = |block: &&PeerBlock| holds(block) && !block.except.iter().any(|except| except.contains(&address));
        let peer = |kind| move |block: &PeerBlock| Peer { rule: block.rule, kind };
        blocks
            .iter()
            .find(admits)
            .map(peer(PeerKind::Allow))
            .or_else(|| blocks.iter().find(holds).map(peer(PeerKind::Except)))
    }

    fn longest(peers: &BTreeMap<IpNet, Peer>, address: IpAddr) -> Option<Peer> {
        peers
            .iter()
            .filter(|(net, _)| net.contains(&address))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, peer)| *peer)
    }

    /// A small address space, so that prefixes often overlap.
    fn net(v6: bool, bits: u8, length: u8) -> IpNet {
        let text =
            if v6 { format!("fd00::{bits:x}/{}", 120 + length) } else { format!("10.0.0.{bits}/{}", 24 + length) };
        text.parse::<IpNet>().unwrap().trunc()
    }

    fn block() -> impl Strategy<Value = PeerBlock> {
        let inside = prop::collection::vec((any::<u8>(), 0u8..=8), 0..3);
        (0usize..4, any::<bool>(), any::<u8>(), 0u8..=8, inside).prop_map(|(rule, v6, bits, length, inside)| {
            let cidr = net(v6, bits, length);
            let except = inside
                .into_iter()
                .map(|(bits, length)| net(v6, bits, length))
                .filter(|net| cidr.contains(net))
                .collect();
            PeerBlock { rule, cidr, except }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn what_two_lists_have_in_common_both_admit(one in prop::collection::vec(block(), 0..5), other in prop::collection::vec(block(), 0..5)) {
            let (one, other) = (peers(&one), peers(&other));
            let both = common(&one, &other);
            let admits = |list: &BTreeMap<IpNet, Peer>, address| longest(list, address).is_some_and(|peer| peer.kind == PeerKind::Allow);
            for last in 0..=255u8 {
                for address in [IpAddr::from([10, 0, 0, last]), format!("fd00::{last:x}").parse().unwrap(), "10.0.1.1".parse().unwrap()] {
                    prop_assert_eq!(admits(&both, address), admits(&one, address) && admits(&other, address));
                }
            }
        }

        #[test]
        fn the_longest_match_says_what_the_blocks_mean(blocks in prop::collection::vec(block(), 0..8)) {
            let peers = peers(&blocks);
            for last in 0..=255u8 {
                for address in [IpAddr::from([10, 0, 0, last]), format!("fd00::{last:x}").parse().unwrap(), "10.0.1.1".parse().unwrap()] {
                    prop_assert_eq!(longest(&peers, address), oracle(&blocks, address), "{} {:?}", address, blocks);
                }
            }
        }
    }
}
