//! Owns the sizes of the tables and what limits a look-up.
//! Called by guard-ebpf, which declares the maps, and by the daemon, which reports how full they are.
//! Must never change without a new `ABI`: a pinned map of another size is not taken over.

use crate::verdict::Reason;

/// Rules of one policy.
pub const MAX_RULES: u32 = 1024;
/// Rule slots. A rule keeps its slot, and with it its counters, as long as its name is in the policy. Twice the number of rules, so that
/// an edit that renames all of them fits beside the rules in force.
pub const RULE_SLOTS: u32 = MAX_RULES * 2;
/// The rule slot of a decision that reached no rule.
pub const NO_RULE: u16 = RULE_SLOTS as u16;
/// Entries of the counter table: every rule slot and [`NO_RULE`], each with [`Reason::SLOTS`] counters, and as many again for audited
/// packets.
pub const MAX_COUNTERS: u32 = (RULE_SLOTS + 1) * Reason::SLOTS * 2;
/// Guarded ports and ports of destinations, one entry for each port of a range, two generations. A port of pods has an entry for each set of
/// rules and one for the pods of which it cannot be told which set is theirs.
pub const MAX_PORTS: u32 = 1 << 19;
/// Words of the set of guarded port numbers: two generations of 65,536 bits.
pub const MAX_PORT_WORDS: u32 = 2 << 10;
/// Pod prefixes and node addresses, two generations.
pub const MAX_SCOPES: u32 = 1 << 16;
/// Peer prefixes of `cidr` and `except`, two generations.
pub const MAX_PEERS: u32 = 1 << 18;
/// Pinholes of the tunnel open at once. When the table is full a new dial is refused; no open pinhole is lost. Only the daemon's own sockets
/// use it, so that nobody else on the node can fill it.
pub const MAX_PINHOLES: u32 = 1 << 16;
/// Pinholes of the node's own processes, of callers and of the companion; the least recently used one is evicted. A pinhole is needed only
/// during a handshake, so whoever opens connections to ports that never answer evicts its own.
pub const MAX_OPENED: u32 = 1 << 16;
/// Marks of addresses that opened a pinhole.
pub const OPENER_SLOTS: u32 = 1 << 11;
/// Sockets registered and not yet connected.
pub const MAX_COOKIES: u32 = 1 << 14;
/// Datagrams of the node and of callers on their way to a guarded port; the least recently used one is evicted.
pub const MAX_SENT: u32 = 1 << 16;
/// Nanoseconds that such a datagram may be on its way.
pub const SENT_NANOSECONDS: u64 = 1_000_000_000;
/// Remote sides that guarded UDP sockets have asked: one table for the sockets of the node, one for those of pods. The least recently used
/// entry is evicted, and its answer denied.
pub const MAX_ASKED: u32 = 1 << 15;
/// Seconds for which an answer is awaited after the guarded socket's last datagram: the kernel's default of
/// `nf_conntrack_udp_timeout_stream`.
pub const UDP_FLOW_SECONDS: u32 = 120;
/// Network namespaces whose addresses are known, two generations.
pub const MAX_NAMESPACES: u32 = 1 << 14;
/// Sockets that were there before the guard on a kernel that cannot tell a socket's network namespace.
pub const MAX_EARLIER_SOCKETS: u32 = 1 << 16;
/// Cgroups that a policy names, and peer lists that admit them, two generations.
pub const MAX_CALLERS: u32 = 1 << 14;
/// Prefixes of destinations of the hub rule and of the companion, two generations.
pub const MAX_DESTINATIONS: u32 = 1 << 16;
/// How many levels below the root are searched for a named cgroup.
pub const CGROUP_LEVELS: u32 = 12;
/// Bytes of the deny events' ring buffer.
pub const EVENTS_BYTES: u32 = 1 << 20;
