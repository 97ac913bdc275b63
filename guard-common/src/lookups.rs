//! Owns what a judgement asks: the tables of the rulesets, and facts about a socket or a process.
//! Called by every judgement of this crate. Implemented by guard-ebpf over maps and helpers, and by the host over ordinary collections.
//! Must never judge: an implementation that cannot answer gives the answer that admits less.

use crate::{
    abi::{
        AskedKey, CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey, DestinationValue, FlowKey,
        NamespaceKey, NamespaceValue, PeerKey4, PeerKey6, PeerValue, Pinhole, PortKey, PortValue, ScopeKey, ScopeValue,
        SentDatagram,
    },
    in_force::RulesetSwitch,
    listener::Namespace,
};

/// The look-ups about a packet to a guarded port.
pub trait Lookups: RulesetSwitch {
    /// The longest prefix that contains this destination.
    fn scope(&self, key: &ScopeKey) -> Option<ScopeValue>;
    /// The guarded port.
    fn port(&self, key: &PortKey) -> Option<PortValue>;
    /// Whether a port with this number is guarded in any scope. Asked before the copies, because most ports are not guarded.
    fn is_guarded_number(&self, generation: u8, port: u16) -> bool;
    /// The same as `scope`, from the copy of that table.
    fn scope_copy(&self, key: &ScopeKey) -> Option<ScopeValue>;
    /// The same as `port`, from the copy of that table.
    fn port_copy(&self, key: &PortKey) -> Option<PortValue>;
    /// The scope of a network namespace whose addresses are known.
    fn namespace_scope(&self, key: &NamespaceKey) -> Option<NamespaceValue>;
    /// The pinhole of exactly this TCP flow.
    fn pinhole(&self, key: &FlowKey) -> Option<Pinhole>;
    /// The datagram of exactly this UDP flow that a socket of this node has just sent, if it has not expired.
    fn sent(&self, key: &FlowKey) -> Option<SentDatagram>;
    /// Whether this UDP socket asked this remote side and still awaits an answer.
    fn asked(&self, key: &AskedKey) -> bool;
    /// A cgroup that a peer list admits.
    fn caller(&self, key: &CallerKey) -> Option<CallerValue>;
    /// The longest prefix of an IPv4 peer list that contains this source.
    fn peer_v4(&self, key: &PeerKey4) -> Option<PeerValue>;
    /// The longest prefix of an IPv6 peer list that contains this source.
    fn peer_v6(&self, key: &PeerKey6) -> Option<PeerValue>;
}

/// The look-up about cgroups that the policy names.
pub trait CgroupLookups: RulesetSwitch {
    /// The roles of a named cgroup; `None` if the policy does not name it.
    fn cgroup(&self, key: &CgroupKey) -> Option<CgroupValue>;
}

/// The look-ups about a destination that a process of this node connects or sends to.
pub trait DestinationLookups: RulesetSwitch {
    /// The longest prefix of a list that contains this destination.
    fn destination(&self, key: &DestinationKey) -> Option<DestinationValue>;
    /// Whether a set of destinations has this port.
    fn has_port(&self, key: &PortKey) -> bool;
}

/// The cgroups around a socket or a process.
pub trait Ancestors {
    /// The id of the cgroup at this level below the root; 0 if the socket or process is not that deep.
    fn cgroup_at(&self, level: u32) -> u64;
}

/// The socket that a packet is for, or that sends it.
pub trait PacketSocket: Ancestors {
    /// Whose network namespace it is in, and the cookie of that namespace; 0 if it cannot be told.
    fn namespace(&self) -> (Namespace, u64);
    /// Its cookie.
    fn cookie(&self) -> u64;
    /// Whether it is a UDP socket, and not a raw one that writes UDP headers.
    fn is_udp(&self) -> bool;
    /// The index of the interface that the packet came in on.
    fn interface(&self) -> u32;
}

/// The memory of the UDP sockets of this node: what they asked, and what is on its way to a guarded port.
pub trait Conversations {
    /// The socket that sends asks a remote side. It awaits an answer unless that side spoke first.
    fn asks(&self, namespace: Namespace, key: &AskedKey);
    /// A datagram of this flow is on its way.
    fn sends(&self, flow: &FlowKey, datagram: SentDatagram);
    /// A socket of this network namespace that may not have such a datagram sends one of this flow: what was on its way from that namespace no
    /// longer is.
    fn takes_over(&self, flow: &FlowKey, netns: u64);
}
