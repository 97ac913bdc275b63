//! Owns the kernel's tables, and the look-ups of guard-common's judgements over them.
//! Called by the hooks, `flows`, `socket` and `report`.
//! Must never write an entry of a ruleset: only the daemon does.

use aya_ebpf::{
    Global,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key},
};
use guard_common::{
    CgroupLookups, DestinationLookups, Lookups, RulesetSwitch,
    abi::{
        Active, Address, Asked, AskedKey, CallerKey, CallerValue, CgroupKey, CgroupValue, DestinationKey,
        DestinationValue, EVENTS_BYTES, EventSlot, FlowKey, Generation, Judged, LoadedFacts, MAX_ASKED, MAX_CALLERS,
        MAX_COOKIES, MAX_COUNTERS, MAX_DESTINATIONS, MAX_EARLIER_SOCKETS, MAX_HEALTH, MAX_NAMESPACES, MAX_OPENED,
        MAX_PEERS, MAX_PINHOLES, MAX_PORT_WORDS, MAX_PORTS, MAX_SCOPES, MAX_SENT, NamespaceKey, NamespaceValue,
        OPENER_SLOTS, PeerKey4, PeerKey6, PeerValue, Pinhole, PortKey, PortValue, RULE_SLOTS, RuleName,
        SENT_NANOSECONDS, ScopeKey, ScopeValue, SentDatagram, Spoken, UDP_FLOW_SECONDS, opener_slot, port_word,
    },
};

use crate::clock::{nanoseconds, seconds};

/// A preallocated hash table takes its full size at once; these grow with the policy.
const NO_PREALLOC: u32 = 1;

#[map]
pub(crate) static ACTIVE: Array<Active> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static GENERATIONS: Array<Generation> = Array::with_max_entries(2, 0);
#[map]
pub(crate) static SCOPES: LpmTrie<ScopeKey, ScopeValue> = LpmTrie::with_max_entries(MAX_SCOPES, 0);
#[map]
pub(crate) static PORTS: HashMap<PortKey, PortValue> = HashMap::with_max_entries(MAX_PORTS, NO_PREALLOC);
/// Copies of both, and the port numbers in them: a port counts as not guarded only if the copies agree.
#[map]
pub(crate) static SCOPES_COPY: LpmTrie<ScopeKey, ScopeValue> = LpmTrie::with_max_entries(MAX_SCOPES, 0);
#[map]
pub(crate) static PORTS_COPY: HashMap<PortKey, PortValue> = HashMap::with_max_entries(MAX_PORTS, NO_PREALLOC);
#[map]
pub(crate) static PORT_NUMBERS: Array<u64> = Array::with_max_entries(MAX_PORT_WORDS, 0);
#[map]
pub(crate) static PEERS_V4: LpmTrie<PeerKey4, PeerValue> = LpmTrie::with_max_entries(MAX_PEERS, 0);
#[map]
pub(crate) static PEERS_V6: LpmTrie<PeerKey6, PeerValue> = LpmTrie::with_max_entries(MAX_PEERS, 0);
#[map]
pub(crate) static CALLERS: HashMap<CallerKey, CallerValue> = HashMap::with_max_entries(MAX_CALLERS, NO_PREALLOC);
#[map]
pub(crate) static CGROUPS: HashMap<CgroupKey, CgroupValue> = HashMap::with_max_entries(MAX_CALLERS, NO_PREALLOC);
#[map]
pub(crate) static DESTINATIONS: LpmTrie<DestinationKey, DestinationValue> =
    LpmTrie::with_max_entries(MAX_DESTINATIONS, 0);
/// The scopes of network namespaces whose addresses are known.
#[map]
pub(crate) static NAMESPACES: HashMap<NamespaceKey, NamespaceValue> =
    HashMap::with_max_entries(MAX_NAMESPACES, NO_PREALLOC);
/// Pinholes of the daemon's own sockets. Nobody else's connections take room here.
#[map]
pub(crate) static PINHOLES: HashMap<FlowKey, Pinhole> = HashMap::with_max_entries(MAX_PINHOLES, NO_PREALLOC);
/// Pinholes of the node's own processes, of callers and of the companion.
#[map]
pub(crate) static OPENED: LruHashMap<FlowKey, Pinhole> = LruHashMap::with_max_entries(MAX_OPENED, 0);
/// Whether an address opened a pinhole, by its `opener_slot`.
#[map]
pub(crate) static OPENERS: Array<u8> = Array::with_max_entries(OPENER_SLOTS, 0);
#[map]
pub(crate) static COOKIES: HashMap<u64, Pinhole> = HashMap::with_max_entries(MAX_COOKIES, NO_PREALLOC);
/// Sockets of callers and of the companion between their connect hook and their SYN.
#[map]
pub(crate) static CONNECTING: LruHashMap<u64, Pinhole> = LruHashMap::with_max_entries(MAX_COOKIES, 0);
/// Datagrams of the node and of callers on their way to a guarded port.
#[map]
pub(crate) static SENT: LruHashMap<FlowKey, SentDatagram> = LruHashMap::with_max_entries(MAX_SENT, 0);
/// What guarded UDP sockets of the node have asked, and those of pods: a pod cannot evict an entry of the node.
#[map]
pub(crate) static ASKED: LruHashMap<AskedKey, Asked> = LruHashMap::with_max_entries(MAX_ASKED, 0);
#[map]
pub(crate) static ASKED_BY_PODS: LruHashMap<AskedKey, Asked> = LruHashMap::with_max_entries(MAX_ASKED, 0);
/// Who spoke first to a guarded UDP socket: memory of the socket itself.
#[btf_map]
pub(crate) static SPOKEN: SkStorage<Spoken> = SkStorage::new();
/// The network namespace of a socket, noted when it begins to listen, where the kernel has no helper to tell it.
#[btf_map]
pub(crate) static NAMESPACE_OF: SkStorage<u64> = SkStorage::new();
/// The same for sockets that were there before the guard, by their cookies. Only the daemon writes it.
#[map]
pub(crate) static EARLIER_SOCKETS: HashMap<u64, u64> = HashMap::with_max_entries(MAX_EARLIER_SOCKETS, NO_PREALLOC);
/// Not read by any program: the facts that the attached programs were loaded with.
#[map]
pub(crate) static LOADED: Array<LoadedFacts> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_COUNTERS, 0);
/// Not read by any program: the counters from before an upgrade from another ABI.
#[map]
pub(crate) static CARRIED: Array<u64> = Array::with_max_entries(MAX_COUNTERS, 0);
#[map]
pub(crate) static HEALTH: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_HEALTH, 0);
#[map]
pub(crate) static TOLD: PerCpuArray<EventSlot> = PerCpuArray::with_max_entries(EventSlot::SLOTS + 1, 0);
/// The packet that this CPU judged last, until the other ingress program has seen it.
#[map]
pub(crate) static JUDGED: PerCpuArray<Judged> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);
/// Not read by any program: the names of the rule slots, so that counters keep their meaning without the daemon.
#[map]
pub(crate) static RULE_NAMES: Array<RuleName> = Array::with_max_entries(RULE_SLOTS, 0);

/// The cookie of the node's own network namespace. Set at load.
#[unsafe(no_mangle)]
static NODE_NETNS: Global<u64> = Global::new(0);
/// 1 if cgroup_skb programs have `bpf_get_netns_cookie` (kernel 6.15). Set at load; the verifier removes the dead branch.
#[unsafe(no_mangle)]
static NETNS_HELPER: Global<u32> = Global::new(0);

/// The cookie of the node's own network namespace.
#[inline(always)]
pub(crate) fn node_netns() -> u64 {
    NODE_NETNS.load()
}

/// Whether a cgroup_skb program can get a socket's network namespace.
#[inline(always)]
pub(crate) fn has_netns_helper() -> bool {
    NETNS_HELPER.load() != 0
}

/// The pinned tables, as the judgements see them.
pub(crate) struct KernelTables;

impl RulesetSwitch for KernelTables {
    #[inline(always)]
    fn active(&self) -> u32 {
        ACTIVE.get(0).map_or(0, |active| active.epoch)
    }

    #[inline(always)]
    fn generation(&self, number: u8) -> Generation {
        GENERATIONS.get(u32::from(number)).copied().unwrap_or_default()
    }
}

impl Lookups for KernelTables {
    #[inline(always)]
    fn scope(&self, key: &ScopeKey) -> Option<ScopeValue> {
        SCOPES.get(Key::new(bits::<ScopeKey>(), *key)).copied()
    }

    #[inline(always)]
    fn port(&self, key: &PortKey) -> Option<PortValue> {
        // SAFETY: the value is copied at once; a concurrent write replaces the whole element, it does not change one.
        unsafe { PORTS.get(key) }.copied()
    }

    #[inline(always)]
    fn is_guarded_number(&self, generation: u8, port: u16) -> bool {
        let (word, bit) = port_word(generation, port);
        PORT_NUMBERS.get(word).is_some_and(|word| word & bit != 0)
    }

    #[inline(always)]
    fn scope_copy(&self, key: &ScopeKey) -> Option<ScopeValue> {
        SCOPES_COPY.get(Key::new(bits::<ScopeKey>(), *key)).copied()
    }

    #[inline(always)]
    fn port_copy(&self, key: &PortKey) -> Option<PortValue> {
        // SAFETY: as above.
        unsafe { PORTS_COPY.get(key) }.copied()
    }

    #[inline(always)]
    fn namespace_scope(&self, key: &NamespaceKey) -> Option<NamespaceValue> {
        // SAFETY: as above.
        unsafe { NAMESPACES.get(key) }.copied()
    }

    #[inline(always)]
    fn sent(&self, key: &FlowKey) -> Option<SentDatagram> {
        // SAFETY: as above.
        let sent = unsafe { SENT.get(key) }.copied()?;
        // Signed: the clocks of two processors may differ a little.
        let age = nanoseconds().wrapping_sub(sent.at_ns) as i64;
        if age <= SENT_NANOSECONDS as i64 { Some(sent) } else { None }
    }

    #[inline(always)]
    fn asked(&self, key: &AskedKey) -> bool {
        // SAFETY: as above.
        let asked = unsafe { ASKED.get(key).or_else(|| ASKED_BY_PODS.get(key)) };
        asked.is_some_and(|asked| seconds().wrapping_sub(asked.at) <= UDP_FLOW_SECONDS)
    }

    #[inline(always)]
    fn pinhole(&self, key: &FlowKey) -> Option<Pinhole> {
        if OPENERS.get(opener_slot(&key.source)).is_none_or(|mark| *mark == 0) {
            return None;
        }
        // SAFETY: as above.
        unsafe { PINHOLES.get(key).or_else(|| OPENED.get(key)) }.copied()
    }

    #[inline(always)]
    fn caller(&self, key: &CallerKey) -> Option<CallerValue> {
        // SAFETY: as above.
        unsafe { CALLERS.get(key) }.copied()
    }

    #[inline(always)]
    fn peer_v4(&self, key: &PeerKey4) -> Option<PeerValue> {
        PEERS_V4.get(Key::new(bits::<PeerKey4>(), *key)).copied()
    }

    #[inline(always)]
    fn peer_v6(&self, key: &PeerKey6) -> Option<PeerValue> {
        PEERS_V6.get(Key::new(bits::<PeerKey6>(), *key)).copied()
    }
}

impl CgroupLookups for KernelTables {
    #[inline(always)]
    fn cgroup(&self, key: &CgroupKey) -> Option<CgroupValue> {
        // SAFETY: as above.
        unsafe { CGROUPS.get(key) }.copied()
    }
}

impl DestinationLookups for KernelTables {
    #[inline(always)]
    fn destination(&self, key: &DestinationKey) -> Option<DestinationValue> {
        DESTINATIONS.get(Key::new(bits::<DestinationKey>(), *key)).copied()
    }

    #[inline(always)]
    fn has_port(&self, key: &PortKey) -> bool {
        self.port(key).is_some()
    }
}

/// Four context words as an address. Volatile, because the verifier rejects reading two words as one.
#[inline(always)]
pub(crate) fn words(from: *const [u32; 4]) -> Address {
    let from: *const u32 = from.cast();
    // SAFETY: the four words of one context field.
    let word = |index: usize| unsafe { from.add(index).read_volatile() }.to_ne_bytes();
    let (a, b, c, d) = (word(0), word(1), word(2), word(3));
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
}

#[inline(always)]
const fn bits<K>() -> u32 {
    (size_of::<K>() as u32) << 3
}
