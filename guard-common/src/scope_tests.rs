//! Owns the tests of whose rules judge a listener: what holds for every namespace, address and set of rules.
//! Called by the test runner.
//! Must never repeat the decision's own logic as its oracle.

use proptest::prelude::*;

use super::*;
use crate::{
    abi::{
        AskedKey, CallerKey, CallerValue, FlowKey, NamespaceKey, NamespaceValue, PeerKey4, PeerKey6, PeerValue,
        Pinhole, PortKey, PortValue, ScopeKey, ScopeValue, SentDatagram,
    },
    in_force::RulesetSwitch,
};

/// Tables whose every scope has a guarded port of its own list, so that a decision tells the scope that judged.
#[derive(Clone, Debug, Default)]
struct Scopes {
    /// The scopes that guard the port; the slot of a scope's rule is its place here.
    guarding: Vec<u32>,
    /// The scopes whose port admits everybody.
    open: Vec<u32>,
    /// The scope of the destination's prefix.
    prefix: Option<u32>,
    /// The scope of the listener's namespace, if its addresses are known.
    namespace: Option<u32>,
}

impl RulesetSwitch for Scopes {
    fn active(&self) -> u32 {
        1
    }
    fn generation(&self, number: u8) -> Generation {
        Generation { epoch: if number == 1 { 1 } else { 0 }, ..Generation::default() }
    }
}

impl Lookups for Scopes {
    fn scope(&self, _: &ScopeKey) -> Option<ScopeValue> {
        self.prefix.map(|scope| ScopeValue { scope })
    }
    fn port(&self, key: &PortKey) -> Option<PortValue> {
        let slot = self.guarding.iter().position(|scope| *scope == key.scope)?;
        let list = u32::from(!self.open.contains(&key.scope));
        Some(PortValue { rule: slot as u16, list, ..PortValue::default() })
    }
    fn is_guarded_number(&self, _: u8, _: u16) -> bool {
        true
    }
    fn scope_copy(&self, key: &ScopeKey) -> Option<ScopeValue> {
        self.scope(key)
    }
    fn port_copy(&self, key: &PortKey) -> Option<PortValue> {
        self.port(key)
    }
    fn namespace_scope(&self, _: &NamespaceKey) -> Option<NamespaceValue> {
        self.namespace.map(|scope| NamespaceValue { scope })
    }
    fn pinhole(&self, _: &FlowKey) -> Option<Pinhole> {
        None
    }
    fn sent(&self, _: &FlowKey) -> Option<SentDatagram> {
        None
    }
    fn asked(&self, _: &AskedKey) -> bool {
        false
    }
    fn caller(&self, _: &CallerKey) -> Option<CallerValue> {
        None
    }
    fn peer_v4(&self, key: &PeerKey4) -> Option<PeerValue> {
        let open = key.list == list_bytes(1, 0);
        open.then_some(PeerValue { rule: 99, kind: PeerValue::ALLOW })
    }
    fn peer_v6(&self, _: &PeerKey6) -> Option<PeerValue> {
        None
    }
}

const EVERY: u32 = ScopeValue::ALL_PODS;
const OTHER: u32 = ScopeValue::OTHER_PODS;

fn judged(tables: &Scopes, namespace: Namespace, in_pods: bool) -> Decision {
    let listener = Listener { namespace, netns: 9, ..Listener::of_node(10_250, 6) };
    let in_force = RulesetInForce::read(tables);
    decide(tests::syn_v4().as_slice(), listener, || in_pods, &in_force, tables)
}

#[test]
fn a_pods_scope_is_that_of_its_namespace_and_only_then_that_of_the_destination() {
    /// What guards, the prefix of the destination, the namespace, whether it is in the pods' cgroup; the scope that judges.
    type Case = (&'static [u32], Option<u32>, Option<u32>, bool, Option<u32>);
    let cases: [Case; 12] = [
        (&[1], Some(1), None, false, Some(1)),
        (&[1], None, None, true, None),
        (&[1, OTHER], None, None, true, Some(OTHER)),
        (&[1, OTHER], None, None, false, None),
        // The node's own address, in a pod's namespace.
        (&[ScopeValue::NODE, OTHER], Some(ScopeValue::NODE), None, true, Some(OTHER)),
        (&[1, 2, OTHER], Some(1), Some(2), false, Some(2)),
        (&[1, OTHER], None, Some(1), false, Some(1)),
        // An address in a prefix that the pod got after its addresses were read.
        (&[1, OTHER], Some(1), Some(EVERY), true, Some(1)),
        (&[1, OTHER], Some(1), Some(EVERY), false, Some(1)),
        (&[1, EVERY, OTHER], None, Some(EVERY), true, Some(EVERY)),
        (&[1, EVERY, OTHER], None, Some(EVERY), false, None),
        (&[ScopeValue::NODE], None, None, true, None),
    ];
    for (guarding, prefix, namespace, in_pods, scope) in cases {
        let tables = Scopes { guarding: guarding.to_vec(), prefix, namespace, ..Scopes::default() };
        let decision = judged(&tables, Namespace::Pod, in_pods);
        let wanted = scope.and_then(|scope| guarding.iter().position(|guard| *guard == scope));
        let found = (decision.reason == Reason::NoSelector).then_some(usize::from(decision.rule));
        assert_eq!(found, wanted, "{guarding:?} {prefix:?} {namespace:?} {in_pods}");
    }
}

proptest! {
    #[test]
    fn what_cannot_be_told_is_denied_by_either(
        guarding in prop::collection::vec(prop::sample::select(vec![ScopeValue::NODE, 1, EVERY, OTHER]), 0..4),
        open in prop::collection::vec(prop::sample::select(vec![ScopeValue::NODE, 1, EVERY, OTHER]), 0..3),
        prefix in prop::option::of(prop::sample::select(vec![ScopeValue::NODE, 1])),
        in_pods: bool,
    ) {
        let tables = Scopes { guarding, open, prefix, namespace: None };
        let [node, pod, unknown] = [Namespace::Node, Namespace::Pod, Namespace::Unknown].map(|whose| judged(&tables, whose, in_pods));
        let either = node.verdict == Verdict::Deny || pod.verdict == Verdict::Deny;
        prop_assert_eq!(unknown.verdict == Verdict::Deny, either);
        prop_assert_eq!(unknown.reason == Reason::NotGuarded, node.reason == Reason::NotGuarded && pod.reason == Reason::NotGuarded);
    }

    #[test]
    fn a_known_pod_is_judged_alike_at_each_of_its_addresses(
        guarding in prop::collection::vec(0u32..4, 0..4), open in prop::collection::vec(0u32..4, 0..3), namespace in 1u32..4,
        prefixes: [Option<u8>; 2], in_pods: [bool; 2],
    ) {
        let at = |index: usize| {
            let prefix = prefixes[index].map(|prefix| u32::from(prefix % 4));
            let tables = Scopes { guarding: guarding.clone(), open: open.clone(), prefix, namespace: Some(namespace) };
            let Decision { verdict, reason, rule, .. } = judged(&tables, Namespace::Pod, in_pods[index]);
            (verdict, reason, rule)
        };
        prop_assert_eq!(at(0), at(1));
    }
}
