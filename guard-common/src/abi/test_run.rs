//! Owns the structs of the development object: what a test run asks and answers, and the flood of the bench.
//! Called by guard-ebpf's `bench`, and by the tests and benches.
//! Must never be used by the object that the daemon loads.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::flow::FlowKey;

/// The question to a test-run entry point, which describes a listener, and its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Probe {
    /// The flow of the answer.
    pub flow: FlowKey,
    /// The epoch of the answer.
    pub epoch: u32,
    /// In: the listener's port, host order.
    pub port: u16,
    /// The rule slot of the answer.
    pub rule: u16,
    /// In: 0 node, 1 pod, any other unknown.
    pub scope: u8,
    /// In: the IP protocol number.
    pub protocol: u8,
    /// [`Reason`](crate::Reason) of the answer as a number.
    pub reason: u8,
    /// The answer: 1 if the rule only audits.
    pub audited: u8,
    /// In: 1 if the listener is in the pods' cgroup.
    pub in_pods: u8,
    /// In: 1 if the packet came in over loopback.
    pub over_loopback: u8,
    /// In: the cookie of the listener's network namespace.
    pub netns: u8,
    /// In: the cookie of its socket.
    pub socket: u8,
}

/// The pace of the bench's flood, and how much of it was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Flood {
    /// The mean number of nanoseconds between packets; zero sends as fast as possible.
    pub pace: u64,
    /// When the next packets may leave, in nanoseconds of `CLOCK_MONOTONIC`.
    pub due: u64,
    /// How many packets were sent.
    pub sent: u64,
}

impl Flood {
    /// The low half of the first source's address; each following source is one more.
    pub const SOURCE: u16 = 0x1000;
    /// The first packet's identification and source port. Both decrease by one with each packet; the port decreases by one more in each
    /// turn of the sources.
    pub const SOURCE_PORT: u16 = 45_000;
    /// The low half of the first sequence number; one more in each turn of the sources.
    pub const SEQUENCE: u16 = 1;
}
