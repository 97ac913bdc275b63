//! Owns which of the two generations is active, and what is known about each.
//! Called by `in_force`, which reads them, and by the daemon, which switches.
//! Must never hold an entry that a packet is looked up in.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The active slot: one store to it makes a whole ruleset active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Active {
    /// The ruleset's epoch; 0 means that none was ever applied. Its lowest bit is the generation that keys carry.
    pub epoch: u32,
}

impl Active {
    /// The generation, 0 or 1, that every key of this epoch's entries carries.
    pub const fn generation(self) -> u8 {
        (self.epoch & 1) as u8
    }
}

/// The facts that the attached programs were loaded with. They are constants of a program, which the kernel's tag of a program does not cover:
/// a start compares them before it adopts a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LoadedFacts {
    /// The cookie of the node's own network namespace.
    pub node_netns: u64,
    /// 1 if the programs ask the kernel for a socket's network namespace.
    pub has_netns_helper: u64,
}

/// What a program needs to know about a generation before its first look-up in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Generation {
    /// The id of the cgroup that pods live in; 0 if that cgroup does not exist (yet).
    pub pods_cgroup: u64,
    /// A set of `Generation::*`.
    pub features: u32,
    /// The epoch that its entries were written for; 0 unless they are complete.
    pub epoch: u32,
    /// Empty, except in a build of another ABI.
    pub reserved: [u32; Generation::SPARE],
}

impl Generation {
    /// Another size in a build of another ABI, so that an upgrade can be tested.
    const SPARE: usize = if cfg!(feature = "other-abi") { 2 } else { 0 };
    /// A UDP port is guarded.
    pub const UDP: u32 = 1;
    /// A rule guards ports of pods.
    pub const PODS: u32 = 2;
    /// The policy names a cgroup: a caller or the companion.
    pub const CGROUPS: u32 = 4;
    /// There is a hub rule.
    pub const CONTROL_PLANE: u32 = 8;
    /// The whole policy only audits.
    pub const AUDIT: u32 = 16;
}
