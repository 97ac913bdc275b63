//! Owns the rule for a socket that is about to connect or to send: where may a process of this node go?
//! Called by guard-ebpf's connect and sendmsg hooks, and by the host for open connections: the same code.
//! Must never concern itself with guarded ports: whom a listener admits is `decide`'s.

use crate::{
    abi::{Address, CgroupValue, DestinationKey, DestinationValue, Generation, PortKey, ScopeValue, list_bytes},
    verdict::{Reason, Verdict},
};

/// Who is about to connect: the deepest cgroup around the process that the policy names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// Its id; 0 where no named cgroup is around the process.
    pub cgroup: u64,
    /// The roles of every named cgroup around the process: `CgroupValue::*`.
    pub roles: u32,
}

/// Where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The address as the process gave it: before any translation.
    pub address: Address,
    /// Host order.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
}

/// The look-ups that this judgement makes.
pub trait DestinationTables {
    /// The longest prefix of a list that holds this destination.
    fn destination(&self, key: &DestinationKey) -> Option<DestinationValue>;
    /// Whether a set of destinations has this port.
    fn has_port(&self, key: &PortKey) -> bool;
}

/// What is to be done with a connection attempt.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// In audit mode `Allow`, although there is a reason to deny.
    pub verdict: Verdict,
    /// Why it is, or would be, denied.
    pub denied: Option<Reason>,
}

/// Judges one destination. `features` are those of the generation ([`Generation`]).
#[inline(always)]
pub fn reach<T: DestinationTables>(
    caller: Caller,
    destination: Destination,
    generation: u8,
    features: u32,
    tables: &T,
) -> Reached {
    let may = |list: u32| {
        let key = DestinationKey { list: list_bytes(generation, list), address: destination.address };
        tables.destination(&key).map(|DestinationValue { set }| {
            let Destination { port, protocol, .. } = destination;
            tables.has_port(&PortKey { scope: ScopeValue::DESTINATIONS | set, port, protocol, generation })
        })
    };
    let denied = if caller.roles & CgroupValue::COMPANION != 0 && may(DestinationKey::COMPANION) != Some(true) {
        Some(Reason::CompanionDestination)
    } else if features & Generation::CONTROL_PLANE != 0 && may(DestinationKey::CONTROL_PLANE) == Some(false) {
        Some(Reason::ControlPlanePort)
    } else {
        None
    };
    let audit = features & Generation::AUDIT != 0;
    Reached { verdict: if denied.is_none() || audit { Verdict::Allow } else { Verdict::Deny }, denied }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The prefixes that hold the destination, by list, and the ports of their sets.
    #[derive(Clone, Debug, Default)]
    struct Fixed {
        control_plane: Option<u32>,
        companion: Option<u32>,
        ports: Vec<(u32, u16, u8)>,
    }

    impl DestinationTables for Fixed {
        fn destination(&self, key: &DestinationKey) -> Option<DestinationValue> {
            let set =
                if key.list == list_bytes(1, DestinationKey::COMPANION) { self.companion } else { self.control_plane };
            set.map(|set| DestinationValue { set })
        }
        fn has_port(&self, key: &PortKey) -> bool {
            self.ports.contains(&(key.scope & !ScopeValue::DESTINATIONS, key.port, key.protocol))
        }
    }

    fn tables() -> impl Strategy<Value = Fixed> {
        let set = || prop::option::of(0u32..2);
        let ports = prop::collection::vec((0u32..2, 1u16..4, prop::sample::select(vec![6u8, 17])), 0..6);
        (set(), set(), ports).prop_map(|(control_plane, companion, ports)| Fixed { control_plane, companion, ports })
    }

    fn destination() -> impl Strategy<Value = Destination> {
        (any::<[u8; 16]>(), 1u16..4, prop::sample::select(vec![6u8, 17]))
            .prop_map(|(address, port, protocol)| Destination { address, port, protocol })
    }

    proptest! {
        #[test]
        fn the_companion_reaches_only_what_is_listed(tables in tables(), to in destination(), features in 0u32..16) {
            let companion = Caller { cgroup: 1, roles: CgroupValue::COMPANION };
            let listed = tables.companion.is_some_and(|set| tables.ports.contains(&(set, to.port, to.protocol)));
            let reached = reach(companion, to, 1, features, &tables);
            prop_assert!(listed || reached.denied == Some(Reason::CompanionDestination));
            prop_assert!(listed || reached.verdict == Verdict::Deny);
        }

        #[test]
        fn others_are_held_off_other_ports_of_the_control_plane_alone(tables in tables(), to in destination(), features in 0u32..16, roles in 0u32..2) {
            let reached = reach(Caller { cgroup: 1, roles }, to, 1, features, &tables);
            let other_port = tables.control_plane.is_some_and(|set| !tables.ports.contains(&(set, to.port, to.protocol)));
            let wanted = (other_port && features & Generation::CONTROL_PLANE != 0).then_some(Reason::ControlPlanePort);
            prop_assert_eq!(reached.denied, wanted);
        }

        #[test]
        fn audit_changes_the_verdict_alone(tables in tables(), to in destination(), features in 0u32..16, roles in 0u32..4) {
            let caller = Caller { cgroup: 1, roles };
            let (enforced, audited) = (reach(caller, to, 1, features, &tables), reach(caller, to, 1, features | Generation::AUDIT, &tables));
            prop_assert_eq!(enforced.denied, audited.denied);
            prop_assert_eq!(audited.verdict, Verdict::Allow);
        }
    }
}
