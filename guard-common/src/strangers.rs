//! Owns the rule of the edge tier: which packets from the network can be dropped before the stack, because no listener would admit them.
//! Called by guard-ebpf's `edge` for every packet of an uplink, and by the tests that compare it with `decide`: the same code.
//! Must never drop a packet that `decide` might admit, or that might not be for a listener of the node.
//!
//! Only the opening packet of a TCP connection is ever dropped: any other packet may belong to a connection that was opened here, by the
//! node or by a pod behind its address translation. No datagram is dropped, because UDP does not tell a question from an answer.

use crate::{
    abi::{ScopeKey, ScopeValue},
    decide::{Decision, decide},
    in_force::RulesetInForce,
    listener::Listener,
    lookups::Lookups,
    packet::{PacketBytes, TCP},
    verdict::{Reason, Verdict},
};

/// The flags of a TCP header that identify an opening packet: of these, only SYN is set.
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Whether a packet is dropped: the whole walk of the edge hook. Reads the ruleset in force. `deny` is called for an opening packet that
/// every listener of the node at its destination would deny, with the denial under the edge's own reason; it returns whether there is such
/// a listener, and reports the denial if so. Every other packet passes.
///
/// A callback and not an `Option`, because the verifier rejects a value that is set on some paths only.
#[inline(always)]
pub fn drops_stranger<B: PacketBytes + ?Sized, L: Lookups>(
    bytes: &B,
    lookups: &L,
    deny: impl FnOnce(&Decision) -> bool,
) -> bool {
    let Some(port) = opened_port(bytes) else { return false };
    let listener = Listener::of_node(port, TCP);
    let in_force = RulesetInForce::read(lookups);
    let decision = decide(bytes, listener, || false, &in_force, lookups);
    let reason = match (decision.verdict, decision.reason) {
        (Verdict::Deny, Reason::NoSelector) => Reason::EdgeNoSelector,
        (Verdict::Deny, Reason::Except) => Reason::EdgeExcept,
        // A flow with a pinhole and an unreadable packet are left to the ingress hook.
        (Verdict::Deny | Verdict::Allow, _) => return false,
    };
    // Only a packet for the node itself is dropped; a forwarded one, to a pod or to another network, passes.
    let generation = [in_force.key_generation(), 0, 0, 0];
    match lookups.scope(&ScopeKey { generation, address: decision.flow.destination }) {
        Some(ScopeValue { scope: ScopeValue::NODE }) => deny(&Decision { reason, ..decision }),
        Some(_) | None => false,
    }
}

/// The same as a value, for the host: the denial.
pub fn denied_at_the_edge<B: PacketBytes + ?Sized, L: Lookups>(bytes: &B, lookups: &L) -> Option<Decision> {
    let mut denied = None;
    drops_stranger(bytes, lookups, |decision| denied.insert(*decision).verdict == Verdict::Deny);
    denied
}

/// The destination port of a TCP connection's opening packet in its plainest shape: no IP options, no extension header, no fragment.
/// Read in small pieces, because the kernel's stack is small and `decide` needs it.
#[inline(always)]
fn opened_port<B: PacketBytes + ?Sized>(bytes: &B) -> Option<u16> {
    let [version, _] = bytes.at::<2>(0)?;
    let tcp = if version == 0x45 {
        let ([flags, offset], [_, protocol]) = (bytes.at::<2>(6)?, bytes.at::<2>(8)?);
        if (flags & 0x3f | offset) != 0 || protocol != TCP {
            return None;
        }
        20
    } else if version >> 4 == 6 {
        let [next, _] = bytes.at::<2>(6)?;
        if next != TCP {
            return None;
        }
        40
    } else {
        return None;
    };
    let [_, flags] = bytes.at::<2>(usize::wrapping_add(tcp, 12))?;
    if flags & (FIN | SYN | RST | ACK) != SYN {
        return None;
    }
    bytes.at::<2>(usize::wrapping_add(tcp, 2)).map(u16::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        abi::{
            AskedKey, CallerKey, CallerValue, FlowKey, Generation, NamespaceKey, NamespaceValue, PeerKey4, PeerKey6,
            PeerValue, Pinhole, PortKey, PortValue, SentDatagram, V4_PREFIX,
        },
        in_force::RulesetSwitch,
        listener::Namespace,
        packet::parse,
    };

    /// One guarded port of the node, 10250, one peer list; the first byte of an address says what it is.
    #[derive(Clone, Copy, Debug)]
    struct Node {
        flags: u16,
        peer: Option<u16>,
        pinhole: Option<u32>,
        caller: bool,
    }

    impl RulesetSwitch for Node {
        fn active(&self) -> u32 {
            7
        }
        fn generation(&self, number: u8) -> Generation {
            Generation { epoch: if number == 1 { 7 } else { 0 }, ..Generation::default() }
        }
    }

    impl Lookups for Node {
        fn is_guarded_number(&self, _: u8, port: u16) -> bool {
            port == 10_250
        }
        fn scope_copy(&self, key: &ScopeKey) -> Option<ScopeValue> {
            self.scope(key)
        }
        fn port_copy(&self, key: &PortKey) -> Option<PortValue> {
            self.port(key)
        }
        fn scope(&self, key: &ScopeKey) -> Option<ScopeValue> {
            let first = if key.address.first_chunk() == Some(&V4_PREFIX) { key.address[12] } else { key.address[0] };
            match first {
                10 | 0xfd => Some(ScopeValue { scope: ScopeValue::NODE }),
                11 => Some(ScopeValue { scope: 1 }),
                _ => None,
            }
        }
        fn port(&self, key: &PortKey) -> Option<PortValue> {
            let known =
                key.port == 10_250 && key.protocol == TCP && key.scope == ScopeValue::NODE && key.generation == 1;
            known.then_some(PortValue { flags: self.flags, rule: 3, ..PortValue::default() })
        }
        fn namespace_scope(&self, _: &NamespaceKey) -> Option<NamespaceValue> {
            None
        }
        fn pinhole(&self, _: &FlowKey) -> Option<Pinhole> {
            self.pinhole.map(Pinhole::of)
        }
        fn sent(&self, _: &FlowKey) -> Option<SentDatagram> {
            None
        }
        fn asked(&self, _: &AskedKey) -> bool {
            false
        }
        fn caller(&self, _: &CallerKey) -> Option<CallerValue> {
            self.caller.then_some(CallerValue { rule: 1 })
        }
        fn peer_v4(&self, _: &PeerKey4) -> Option<PeerValue> {
            self.peer.map(|kind| PeerValue { rule: 4, kind })
        }
        fn peer_v6(&self, _: &PeerKey6) -> Option<PeerValue> {
            self.peer.map(|kind| PeerValue { rule: 4, kind })
        }
    }

    fn node() -> impl Strategy<Value = Node> {
        (0u16..16, prop::option::of(0u16..4), prop::option::of(0u32..32), any::<bool>())
            .prop_map(|(flags, peer, pinhole, caller)| Node { flags, peer, pinhole, caller })
    }

    /// Mostly openings of the guarded port, and what is a bit or a byte beside them.
    fn packet() -> impl Strategy<Value = Vec<u8>> {
        let v4 = (prop::sample::select(vec![10u8, 11, 12]), 0u8..64).prop_map(|(to, flags)| syn(false, to, flags));
        let v6 = (prop::sample::select(vec![0xfdu8, 11, 12]), 0u8..64).prop_map(|(to, flags)| syn(true, to, flags));
        let whole = prop_oneof![v4, v6, Just(syn(false, 10, SYN)), Just(syn(true, 0xfd, SYN))];
        (whole, prop::option::of((0usize..60, any::<u8>())), prop::option::weighted(0.1, 0usize..60)).prop_map(
            |(mut bytes, wrong, cut)| {
                if let Some((at, byte)) = wrong
                    && let Some(place) = bytes.get_mut(at)
                {
                    *place = byte;
                }
                bytes.truncate(cut.unwrap_or(bytes.len()));
                bytes
            },
        )
    }

    fn syn(is_v6: bool, to: u8, flags: u8) -> Vec<u8> {
        let mut bytes = vec![0u8; if is_v6 { 60 } else { 40 }];
        let header = if is_v6 { 40 } else { 20 };
        if is_v6 {
            (bytes[0], bytes[6]) = (0x60, TCP);
            (bytes[8], bytes[24]) = (0x20, to);
        } else {
            (bytes[0], bytes[9]) = (0x45, TCP);
            bytes[12..20].copy_from_slice(&[192, 0, 2, 1, to, 0, 0, 2]);
        }
        bytes[header..header + 4].copy_from_slice(&[0x9c, 0x40, 0x28, 0x0a]);
        bytes[header + 13] = flags;
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn what_is_dropped_here_every_listener_of_the_node_would_deny(bytes in packet(), node in node()) {
            if let Some(decision) = denied_at_the_edge(bytes.as_slice(), &node) {
                let port = u16::from_be_bytes(decision.flow.destination_port);
                prop_assert_eq!(decision.verdict, Verdict::Deny);
                prop_assert!(!decision.audited && node.flags & PortValue::AUDIT == 0);
                for namespace in [Namespace::Node, Namespace::Unknown] {
                    for in_pods in [false, true] {
                        let listener = Listener { namespace, ..Listener::of_node(port, TCP) };
                        let judged = decide(bytes.as_slice(), listener, || in_pods, &RulesetInForce::read(&node), &node);
                        prop_assert_eq!(judged.verdict, Verdict::Deny, "{:?} {:02x?}", namespace, bytes);
                        prop_assert!(matches!(judged.reason, Reason::NoSelector | Reason::Except));
                        prop_assert_eq!((judged.rule, judged.flow), (decision.rule, decision.flow));
                    }
                }
                let packet = parse(bytes.as_slice(), TCP).unwrap();
                prop_assert_eq!(node.scope(&ScopeKey { generation: [1, 0, 0, 0], address: packet.destination }), Some(ScopeValue { scope: ScopeValue::NODE }));
                let at = if packet.is_v4 { 20 } else { 40 };
                prop_assert_eq!(bytes[at + 13] & 0x17, SYN);
            }
        }

        #[test]
        fn a_stranger_is_dropped_and_nobody_else(is_v6 in any::<bool>(), flags in 0u8..64, node in node()) {
            let packet = syn(is_v6, if is_v6 { 0xfd } else { 10 }, flags);
            let dropped = denied_at_the_edge(packet.as_slice(), &node).map(|decision| decision.reason);
            let opens = flags & (FIN | SYN | RST | ACK) == SYN;
            let opened = node.pinhole.is_some_and(|via| via != 0);
            let admits = node.pinhole.is_some_and(|via| {
                via & Pinhole::TUNNEL != 0 && node.flags & PortValue::ALLOW_TUNNEL != 0
                    || via & Pinhole::NODE != 0 && node.flags & PortValue::ALLOW_NODE != 0
                    || via & Pinhole::CALLER != 0 && node.caller
            });
            let wanted = match node.peer {
                _ if !opens || node.flags & PortValue::AUDIT != 0 || admits => None,
                Some(PeerValue::ALLOW) => None,
                Some(PeerValue::EXCEPT) => Some(Reason::EdgeExcept),
                Some(_) | None => (!opened).then_some(Reason::EdgeNoSelector),
            };
            prop_assert_eq!(dropped, wanted);
        }
    }

    #[test]
    fn what_is_not_plain_or_not_for_the_node_passes() {
        let node = Node { flags: 0, peer: None, pinhole: None, caller: false };
        let dropped = |bytes: Vec<u8>| denied_at_the_edge(bytes.as_slice(), &node).is_some();
        let with = |is_v6: bool, edit: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = syn(is_v6, if is_v6 { 0xfd } else { 10 }, SYN);
            edit(&mut bytes);
            dropped(bytes)
        };
        assert!(with(false, &|_| {}) && with(true, &|_| {}));
        assert!(with(false, &|bytes| bytes[6] = 0x40), "don't fragment is plain");
        for (what, passes) in [
            ("options", !with(false, &|bytes| bytes[0] = 0x46)),
            ("more fragments", !with(false, &|bytes| bytes[6] = 0x20)),
            ("a later fragment", !with(false, &|bytes| bytes[7] = 1)),
            ("another protocol", !with(false, &|bytes| bytes[9] = 17)),
            ("an extension header", !with(true, &|bytes| bytes[6] = 0)),
            ("a fragment header", !with(true, &|bytes| bytes[6] = 44)),
            ("a mapped source", !with(true, &|bytes| bytes[8..20].copy_from_slice(&V4_PREFIX))),
            ("cut before the flags", !with(false, &|bytes| bytes.truncate(33))),
            ("another port", !with(false, &|bytes| bytes[23] ^= 1)),
            ("a pod's address", !dropped(syn(false, 11, SYN))),
            ("an address that is forwarded", !dropped(syn(false, 12, SYN))),
            ("the answer to an opening", !dropped(syn(false, 10, SYN | ACK))),
            ("what follows", !dropped(syn(false, 10, ACK))),
        ] {
            assert!(passes, "{what}");
        }
    }
}
