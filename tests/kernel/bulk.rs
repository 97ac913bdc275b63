//! Owns the proof that tables of many entries hold exactly what was written, whatever a system call takes at once and whoever else removed some.
//! Called by the test runner.
//! Must never be smaller than two batches.

use std::sync::Arc;

use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use guard_common::abi::{PeerKey4, PeerValue};
use guard_policy::ruleset::{Mode, Peer, PeerKind, RuleSummary, Ruleset, RulesetTables};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lab::agree::load;
use nodeguard::kernel::tables::{
    apply::{Apply, MendScope},
    ruleset_maps::RulesetMaps,
};

use crate::agree::object;

const COUNT: u32 = 40_000;

fn ruleset(salt: u32) -> Ruleset {
    let rule = RuleSummary { name: "many".into(), mode: Mode::Enforce, guards: String::new(), allows: String::new() };
    let mut tables = RulesetTables::default();
    for number in 0..COUNT {
        let v4 = Ipv4Net::new_assert((number * 64 + salt).into(), 32);
        let v6 = Ipv6Net::new_assert((u128::from(number * 64 + salt) << 64).into(), 128);
        for net in [IpNet::from(v4), IpNet::from(v6)] {
            tables.peers.insert((0, net), Peer { rule: 0, kind: PeerKind::Allow });
        }
    }
    let (name, digest, dial) = ("many".into(), String::new(), Vec::new());
    Ruleset { name, digest, mode: Mode::Enforce, rules: vec![rule], tables, dial, services: Default::default() }
}

#[test]
fn a_big_table_holds_what_was_written_also_where_somebody_else_removed_some() {
    let mut ebpf = load(&object("guard-dev.o"));
    let Some(Map::LpmTrie(peers)) = ebpf.map("PEERS_V4") else { panic!("PEERS_V4 is no trie") };
    let again = Map::from_map_data(MapData::from_id(peers.info().unwrap().id()).unwrap()).unwrap();
    let mut other: LpmTrie<MapData, PeerKey4, PeerValue> = again.try_into().unwrap();
    let mut apply = Apply::new(RulesetMaps::take(&mut ebpf).unwrap()).unwrap();
    for salt in 0..4 {
        apply.apply(&Arc::new(ruleset(salt))).unwrap();
        assert_eq!(apply.image().unwrap().entries.peers_v4.len(), COUNT as usize);
        assert!(!apply.mend(MendScope::All).unwrap(), "the maps hold something else than was written");
        // Ends batches of the removal that comes with the next ruleset: at the first entry, in the middle, side by side, at the last.
        let keys: Vec<Key<PeerKey4>> = other.keys().map(Result::unwrap).collect();
        assert_eq!(keys.len(), COUNT as usize);
        for index in [0, 1, 16_383, 16_384, 20_000, 39_999] {
            other.remove(&keys[index]).unwrap();
        }
    }
    assert!(apply.mend(MendScope::All).unwrap(), "what was removed went unseen");
    assert!(!apply.mend(MendScope::All).unwrap());
    assert_eq!(other.keys().count(), COUNT as usize);
}
