//! Owns the words of a decision: verdict and reason.
//! Called by every judgement, and by the kernel programs and the daemon to act on a decision and to count it.
//! Must never hold a reason without a stable name: names are metric labels and appear in `nodeguard status`.

/// What happens to the packet. Never a bare integer, so that a verdict cannot be computed and dropped.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The packet goes on to the listener.
    Allow,
    /// The packet is dropped before the listener sees it: no SYN-ACK, no RST.
    Deny,
}

/// Why a verdict was reached. The discriminant is the index in the kernel's counter table and is part of the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// No rule guards this port.
    NotGuarded = 0,
    /// The flow is a dial of the tunnel, for which the guard opened a pinhole, and the rule allows `tunnel`.
    Tunnel = 1,
    /// The connection was opened in this node's own network namespace, and the rule allows `node`.
    Node = 2,
    /// The source address is inside an `ipBlock` of the rule.
    IpBlock = 3,
    /// No selector of the rule admits this peer.
    NoSelector = 4,
    /// The source address is inside an `except` of the only `ipBlock` that would have admitted it.
    Except = 5,
    /// The flow has a pinhole, but the rule does not allow what opened it.
    PinholeNotAllowed = 6,
    /// The IP header could not be read, so there is no peer to look up.
    BadHeader = 7,
    /// The datagram answers what the guarded UDP socket itself asked.
    Reply = 8,
    /// The connection was opened by a process in a cgroup that the rule allows as a `caller`.
    Caller = 9,
    /// From this node or its pods to a control-plane address, on a port that the hub rule does not name.
    ControlPlanePort = 10,
    /// From the companion to an address or port that is neither a destination of `tunnel.dial` nor one of its servers.
    CompanionDestination = 11,
    /// Only the copies of the tables guard the port, or no generation is whole: something other than the daemon wrote to the tables.
    TableDamaged = 12,
    /// The same as [`Reason::NoSelector`], at the network interface.
    EdgeNoSelector = 13,
    /// The same as [`Reason::Except`], at the network interface.
    EdgeExcept = 14,
    /// A pod reaches itself: the packet was sent in the network namespace of the pod's own listener.
    OwnNamespace = 15,
}

impl Reason {
    /// The number of counter slots per rule. Not smaller than the number of reasons.
    pub const SLOTS: u32 = 16;

    /// Every reason, in the order of its discriminant.
    pub const ALL: [Reason; 16] = [
        Reason::NotGuarded,
        Reason::Tunnel,
        Reason::Node,
        Reason::IpBlock,
        Reason::NoSelector,
        Reason::Except,
        Reason::PinholeNotAllowed,
        Reason::BadHeader,
        Reason::Reply,
        Reason::Caller,
        Reason::ControlPlanePort,
        Reason::CompanionDestination,
        Reason::TableDamaged,
        Reason::EdgeNoSelector,
        Reason::EdgeExcept,
        Reason::OwnNamespace,
    ];

    /// The stable name, in metric labels, events and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::NotGuarded => "not-guarded",
            Reason::Tunnel => "tunnel",
            Reason::Node => "node",
            Reason::IpBlock => "ip-block",
            Reason::NoSelector => "no-selector",
            Reason::Except => "except",
            Reason::PinholeNotAllowed => "pinhole-not-allowed",
            Reason::BadHeader => "bad-header",
            Reason::Reply => "reply",
            Reason::Caller => "caller",
            Reason::ControlPlanePort => "control-plane-port",
            Reason::CompanionDestination => "companion-destination",
            Reason::TableDamaged => "table-damaged",
            Reason::EdgeNoSelector => "edge-no-selector",
            Reason::EdgeExcept => "edge-except",
            Reason::OwnNamespace => "self",
        }
    }

    /// The verdict of this reason if the rule enforces.
    pub const fn verdict(self) -> Verdict {
        match self {
            Reason::NotGuarded
            | Reason::Tunnel
            | Reason::Node
            | Reason::Caller
            | Reason::Reply
            | Reason::IpBlock
            | Reason::OwnNamespace => Verdict::Allow,
            Reason::NoSelector
            | Reason::Except
            | Reason::PinholeNotAllowed
            | Reason::BadHeader
            | Reason::ControlPlanePort
            | Reason::CompanionDestination
            | Reason::TableDamaged
            | Reason::EdgeNoSelector
            | Reason::EdgeExcept => Verdict::Deny,
        }
    }

    /// The reason of a counter index or an event byte; `None` for a number that no reason has.
    pub fn from_index(index: u8) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| *reason as u8 == index)
    }
}
