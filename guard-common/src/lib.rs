//! Owns what the kernel programs and the daemon share: the judgements, and the structs that cross the kernel boundary.
//! Called by guard-ebpf (every packet), by guard (maps, events) and by the tests that compare the two.
//! Must never do IO, allocate, or panic: the kernel's verifier rejects a reachable panic.
//!
//! The order of reading, in which each file imports only from those before it: `verdict`, `abi`, `packet`, `in_force`, `listener`,
//! `lookups`; then the judgements: `decide` (a packet), `strangers` (a packet at the edge), `caller` and `reach` (a connection that starts
//! here), `openings` (what sockets of this node open).
#![cfg_attr(not(test), no_std)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used,
        reason = "tests may panic"
    )
)]

pub mod abi;
pub mod caller;
pub mod decide;
pub mod in_force;
pub mod listener;
pub mod lookups;
pub mod openings;
pub mod packet;
pub mod reach;
pub mod strangers;
pub mod verdict;

pub use caller::{LocalCaller, local_caller};
pub use decide::{Decision, decide, judge_packet};
pub use in_force::{RulesetInForce, RulesetSwitch};
pub use listener::{Listener, Namespace, in_pods};
pub use lookups::{Ancestors, CgroupLookups, Conversations, DestinationLookups, Lookups, PacketSocket};
pub use openings::{opened_pinhole, sent_datagram};
pub use packet::{Headers, PacketBytes, Ports, parse};
pub use reach::{Destination, Reached, judge_connection, reach};
pub use strangers::{denied_at_the_edge, drops_stranger};
pub use verdict::{Reason, Verdict};

#[cfg(test)]
mod flip_tests;
#[cfg(test)]
mod flip_world;
