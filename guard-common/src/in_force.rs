//! Owns which ruleset is in force: one value that each hook reads once and hands to everything below it.
//! Called by guard-ebpf and by the host's model before a judgement, and by `plan`: the same code.
//! Must never call a generation whole that is not: without a whole one, whatever is guarded is denied.

use crate::abi::Generation;

/// The slots in the tables that say which ruleset is in force.
pub trait RulesetSwitch {
    /// The epoch in the active slot; 0 means that no ruleset was ever applied.
    fn active(&self) -> u32;
    /// The slot of a generation; all zero unless its entries are complete.
    fn generation(&self, number: u8) -> Generation;
}

/// The ruleset in force.
///
/// A hook reads it once. An edit can make another ruleset active while the hook runs; the hook still finds every entry of the ruleset
/// that it read, because the old generation is removed only after a grace period in which every running program has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RulesetInForce {
    /// Its epoch. If no generation is whole, the number in the active slot.
    pub epoch: u32,
    /// The generation that the keys of its entries carry; `None` if no generation is whole, or if both could be meant.
    pub generation: Option<u8>,
    /// A set of `Generation::*`.
    pub features: u32,
    /// The id of the cgroup that pods live in; 0 if that cgroup does not exist (yet).
    pub pods_cgroup: u64,
}

impl RulesetInForce {
    /// Every feature that makes a hook look closer. [`Generation::AUDIT`] is not one: doubt denies.
    const DOUBT: u32 = Generation::UDP | Generation::PODS | Generation::CGROUPS | Generation::CONTROL_PLANE;

    /// Reads the generation of the active epoch if its entries were written for that epoch, otherwise the only generation that is whole.
    #[inline(always)]
    pub fn read<S: RulesetSwitch + ?Sized>(switch: &S) -> RulesetInForce {
        let active = switch.active();
        let own = (active & 1) as u8;
        let slot = switch.generation(own);
        if active != 0 && slot.epoch == active {
            return RulesetInForce::whole(own, slot);
        }
        let (even, odd) = (switch.generation(0), switch.generation(1));
        if odd.epoch == 0 && even.epoch != 0 && even.epoch & 1 == 0 {
            return RulesetInForce::whole(0, even);
        }
        if even.epoch == 0 && odd.epoch & 1 == 1 {
            return RulesetInForce::whole(1, odd);
        }
        RulesetInForce { epoch: active, generation: None, features: RulesetInForce::DOUBT, pods_cgroup: 0 }
    }

    #[inline(always)]
    const fn whole(number: u8, slot: Generation) -> RulesetInForce {
        let Generation { pods_cgroup, features, epoch, .. } = slot;
        RulesetInForce { epoch, generation: Some(number), features, pods_cgroup }
    }

    /// The generation to look up: if none is whole, that of the epoch in the active slot.
    #[inline(always)]
    pub const fn key_generation(&self) -> u8 {
        match self.generation {
            Some(generation) => generation,
            None => (self.epoch & 1) as u8,
        }
    }

    /// Whether the ruleset has at least one of these features (`Generation::*`).
    #[inline(always)]
    pub const fn has(&self, features: u32) -> bool {
        self.features & features != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Slots {
        active: u32,
        epochs: [u32; 2],
    }

    impl RulesetSwitch for Slots {
        fn active(&self) -> u32 {
            self.active
        }
        fn generation(&self, number: u8) -> Generation {
            let (features, pods_cgroup) = (u32::from(number) + 1, u64::from(number) + 7);
            Generation { epoch: self.epochs[usize::from(number)], features, pods_cgroup, ..Generation::default() }
        }
    }

    fn of(active: u32, epochs: [u32; 2]) -> RulesetInForce {
        RulesetInForce::read(&Slots { active, epochs })
    }

    fn whole(epoch: u32) -> RulesetInForce {
        let generation = (epoch & 1) as u8;
        let (features, pods_cgroup) = (u32::from(generation) + 1, u64::from(generation) + 7);
        RulesetInForce { epoch, generation: Some(generation), features, pods_cgroup }
    }

    proptest! {
        #[test]
        fn one_wrong_number_changes_nothing(epoch in 2u32.., wrong in any::<u32>()) {
            let generation = (epoch & 1) as u8;
            let only = |number| if generation == 0 { [number, 0] } else { [0, number] };
            prop_assert_eq!(of(epoch, only(epoch)), whole(epoch));
            // Another epoch in the active slot, of either generation.
            prop_assert_eq!(of(wrong, only(epoch)), whole(epoch));
            // Another epoch in the generation's own slot: the same entries, or no generation.
            prop_assert!([None, Some(generation)].contains(&of(epoch, only(wrong)).generation));
        }

        #[test]
        fn during_a_switch_the_active_slot_decides(epoch in 2u32..u32::MAX) {
            let (even, odd) = if epoch & 1 == 0 { (epoch, epoch + 1) } else { (epoch + 1, epoch) };
            prop_assert_eq!(of(even, [even, odd]), whole(even));
            prop_assert_eq!(of(odd, [even, odd]), whole(odd));
        }

        #[test]
        fn what_is_meant_was_written_whole(active in any::<u32>(), epochs in any::<[u32; 2]>()) {
            let in_force = of(active, epochs);
            if let Some(generation) = in_force.generation {
                prop_assert_eq!(epochs[usize::from(generation)], in_force.epoch);
                prop_assert!(in_force.epoch != 0);
                prop_assert_eq!(in_force.key_generation(), generation);
            }
        }
    }

    #[test]
    fn with_nothing_whole_there_is_none() {
        for (active, epochs) in [(0, [0, 0]), (7, [0, 0]), (0, [2, 3]), (9, [2, 3])] {
            let in_force = of(active, epochs);
            assert_eq!((in_force.generation, in_force.epoch), (None, active));
            assert!(
                in_force.has(Generation::UDP) && in_force.has(Generation::PODS) && !in_force.has(Generation::AUDIT)
            );
        }
    }
}
