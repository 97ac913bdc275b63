//! Owns what the kernel programs and the daemon share: bytes to a packet, the decision, and the structs that cross the kernel boundary.
//! Called by guard-ebpf (every packet), by guard (maps, events) and by the tests that compare the two.
//! Must never do IO, allocate, or panic: a reachable panic is refused by the kernel's verifier.
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
pub mod decide;
pub mod edge;
pub mod in_force;
pub mod packet;
pub mod reach;
pub mod verdict;

pub use decide::{Listener, Scope, Tables, decide};
pub use edge::{denied_at_the_edge, edge};
pub use in_force::{InForce, in_force};
pub use packet::{Packet, PacketBytes, Ports, parse};
pub use reach::{Caller, Destination, DestinationTables, Reached, reach};
pub use verdict::{Decision, Reason, Verdict};

#[cfg(test)]
mod tests;
