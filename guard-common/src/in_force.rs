//! Owns telling which generation of the tables decides, also where somebody wrote another epoch than the guard did.
//! Called by guard-ebpf and by the host's model before every decision, and by `plan`: the same code.
//! Must never take a generation for whole that is not: then there is none, and what is guarded is denied.

/// What decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// The epoch of the ruleset in force; where there is none, what the table says that is.
    pub epoch: u32,
    /// The generation that its entries carry; `None` where no generation, or more than one, can be meant.
    pub generation: Option<u8>,
}

/// The active epoch's generation, if that was written for it; else the only one that is whole.
#[inline(always)]
pub fn in_force(active: u32, epoch_of: impl Fn(u8) -> u32) -> InForce {
    let own = (active & 1) as u8;
    if active != 0 && epoch_of(own) == active {
        return InForce { epoch: active, generation: Some(own) };
    }
    let (even, odd) = (epoch_of(0), epoch_of(1));
    if odd == 0 && even != 0 && even & 1 == 0 {
        return InForce { epoch: even, generation: Some(0) };
    }
    if even == 0 && odd & 1 == 1 {
        return InForce { epoch: odd, generation: Some(1) };
    }
    InForce { epoch: active, generation: None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(active: u32, epochs: [u32; 2]) -> InForce {
        in_force(active, |generation| epochs[usize::from(generation)])
    }

    proptest! {
        #[test]
        fn one_wrong_number_changes_nothing(epoch in 2u32.., wrong in any::<u32>()) {
            let generation = (epoch & 1) as u8;
            let whole = InForce { epoch, generation: Some(generation) };
            let only = |number| if generation == 0 { [number, 0] } else { [0, number] };
            prop_assert_eq!(of(epoch, only(epoch)), whole);
            // Another epoch in the active slot, whatever its generation.
            prop_assert_eq!(of(wrong, only(epoch)), whole);
            // Another epoch in the generation's own slot: the same entries, or none that can be meant.
            prop_assert!([None, Some(generation)].contains(&of(epoch, only(wrong)).generation));
        }

        #[test]
        fn during_a_switch_the_active_slot_decides(epoch in 2u32..u32::MAX) {
            let (even, odd) = if epoch & 1 == 0 { (epoch, epoch + 1) } else { (epoch + 1, epoch) };
            prop_assert_eq!(of(even, [even, odd]), InForce { epoch: even, generation: Some(0) });
            prop_assert_eq!(of(odd, [even, odd]), InForce { epoch: odd, generation: Some(1) });
        }

        #[test]
        fn what_is_meant_was_written_whole(active in any::<u32>(), epochs in any::<[u32; 2]>()) {
            let InForce { epoch, generation } = of(active, epochs);
            if let Some(generation) = generation {
                prop_assert_eq!(epochs[usize::from(generation)], epoch);
                prop_assert!(epoch != 0);
            }
        }
    }

    #[test]
    fn with_nothing_whole_there_is_none() {
        assert_eq!(of(0, [0, 0]).generation, None);
        assert_eq!(of(7, [0, 0]).generation, None);
        assert_eq!(of(0, [2, 3]).generation, None);
        assert_eq!(of(9, [2, 3]).generation, None);
    }
}
