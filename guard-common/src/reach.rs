//! Owns the rule for a socket that is about to connect or to send: where may a process of this node go?
//! Called by guard-ebpf's connect and sendmsg hooks, and by the host for open connections: the same code.
//! Must never judge who reaches a guarded port: that is the task of `decide`.

use crate::{
    abi::{Address, CgroupValue, DestinationKey, DestinationValue, Generation, PortKey, ScopeValue, list_bytes},
    caller::{LocalCaller, local_caller},
    in_force::RulesetInForce,
    lookups::{Ancestors, CgroupLookups, DestinationLookups},
    verdict::{Reason, Verdict},
};

/// Where a process connects or sends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The address as the process gave it: before any translation.
    pub address: Address,
    /// Host order.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
}

/// The answer to a connection attempt.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// In audit mode `Allow`, although there is a reason to deny.
    pub verdict: Verdict,
    /// Why it is, or would be, denied.
    pub denied: Option<Reason>,
    /// Who connects; nobody if no rule asks for that.
    pub caller: LocalCaller,
    /// Whether the policy names cgroups: without one, nobody has a role.
    pub has_callers: bool,
    /// The epoch of the ruleset that decided.
    pub epoch: u32,
}

/// Judges one connection attempt of a process: the whole walk of the connect and sendmsg hooks. Reads the ruleset in force.
#[inline(always)]
pub fn judge_connection<A: Ancestors, L: CgroupLookups + DestinationLookups>(
    process: &A,
    destination: Destination,
    lookups: &L,
) -> Reached {
    let in_force = RulesetInForce::read(lookups);
    if !in_force.has(Generation::CGROUPS | Generation::CONTROL_PLANE) {
        let caller = LocalCaller { cgroup: 0, roles: 0 };
        return Reached { verdict: Verdict::Allow, denied: None, caller, has_callers: false, epoch: in_force.epoch };
    }
    reach(local_caller(process, &in_force, lookups), destination, &in_force, lookups)
}

/// Judges one destination under the ruleset in force.
#[inline(always)]
pub fn reach<L: DestinationLookups>(
    caller: LocalCaller,
    destination: Destination,
    in_force: &RulesetInForce,
    lookups: &L,
) -> Reached {
    let generation = in_force.key_generation();
    let may = |list: u32| {
        let key = DestinationKey { list: list_bytes(generation, list), address: destination.address };
        lookups.destination(&key).map(|DestinationValue { set }| {
            let Destination { port, protocol, .. } = destination;
            lookups.has_port(&PortKey { scope: ScopeValue::DESTINATIONS | set, port, protocol, generation })
        })
    };
    let denied = if caller.roles & CgroupValue::COMPANION != 0 && may(DestinationKey::COMPANION) != Some(true) {
        Some(Reason::CompanionDestination)
    } else if in_force.has(Generation::CONTROL_PLANE) && may(DestinationKey::CONTROL_PLANE) == Some(false) {
        Some(Reason::ControlPlanePort)
    } else {
        None
    };
    let verdict = if denied.is_none() || in_force.has(Generation::AUDIT) { Verdict::Allow } else { Verdict::Deny };
    Reached { verdict, denied, caller, has_callers: in_force.has(Generation::CGROUPS), epoch: in_force.epoch }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::in_force::RulesetSwitch;

    fn in_force(features: u32) -> RulesetInForce {
        RulesetInForce { epoch: 1, generation: Some(1), features, pods_cgroup: 0 }
    }

    /// The prefixes that hold the destination, by list, and the ports of their sets.
    #[derive(Clone, Debug, Default)]
    struct Fixed {
        control_plane: Option<u32>,
        companion: Option<u32>,
        ports: Vec<(u32, u16, u8)>,
    }

    impl RulesetSwitch for Fixed {
        fn active(&self) -> u32 {
            1
        }
        fn generation(&self, _: u8) -> Generation {
            Generation { epoch: 1, ..Generation::default() }
        }
    }

    impl DestinationLookups for Fixed {
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
            let companion = LocalCaller { cgroup: 1, roles: CgroupValue::COMPANION };
            let listed = tables.companion.is_some_and(|set| tables.ports.contains(&(set, to.port, to.protocol)));
            let reached = reach(companion, to, &in_force(features), &tables);
            prop_assert!(listed || reached.denied == Some(Reason::CompanionDestination));
            prop_assert!(listed || reached.verdict == Verdict::Deny);
        }

        #[test]
        fn others_are_held_off_other_ports_of_the_control_plane_alone(tables in tables(), to in destination(), features in 0u32..16, roles in 0u32..2) {
            let reached = reach(LocalCaller { cgroup: 1, roles }, to, &in_force(features), &tables);
            let other_port = tables.control_plane.is_some_and(|set| !tables.ports.contains(&(set, to.port, to.protocol)));
            let wanted = (other_port && features & Generation::CONTROL_PLANE != 0).then_some(Reason::ControlPlanePort);
            prop_assert_eq!(reached.denied, wanted);
        }

        #[test]
        fn audit_changes_the_verdict_alone(tables in tables(), to in destination(), features in 0u32..16, roles in 0u32..4) {
            let caller = LocalCaller { cgroup: 1, roles };
            let (enforced, audited) = (reach(caller, to, &in_force(features), &tables), reach(caller, to, &in_force(features | Generation::AUDIT), &tables));
            prop_assert_eq!(enforced.denied, audited.denied);
            prop_assert_eq!(audited.verdict, Verdict::Allow);
        }
    }
}
