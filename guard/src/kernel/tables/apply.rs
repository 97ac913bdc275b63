//! Owns writing the maps of the ruleset: it carries out a plan, operation by operation.
//! Called by `daemon/run` at start, `daemon/edit` on every edit and `daemon/hold` for mending.
//! Must never leave the generation in force half-written: a failure before `Activate` has changed nothing that decides.

use std::{
    collections::BTreeMap,
    mem::discriminant,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{MapError, PerCpuValues, lpm_trie::Key};
use guard_common::{
    Reason, RulesetSwitch,
    abi::{
        Active, DestinationKey, DestinationValue, NO_RULE, PeerKey4, PeerKey6, PeerValue, PortKey, PortValue, ScopeKey,
        ScopeValue, counter_index,
    },
};
use guard_policy::{
    ruleset::Ruleset,
    tables::{
        cgroups::Cgroups,
        image::Image,
        pod_scopes::{Namespaces, Observed},
    },
};

use crate::kernel::{
    cgroups::follow::find,
    links::upgrade::CarriedCount,
    observe::map_use::{MapUse, of_image},
    syscalls,
    tables::{
        apply_error::{ApplyError, refused},
        large_map::LargeMap,
        plan::{MapOp, plan},
        read_back::read,
        ruleset_maps::{RulesetMaps, rule_name},
    },
};

/// Which tables are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MendScope {
    /// The tables that decide, without the names of rules and the bit map of port numbers.
    Deciding,
    /// All tables.
    All,
}

/// The only writer of the ruleset's maps.
pub struct Apply {
    maps: RulesetMaps,
    /// What the maps hold; `None` after a failure, so that they are read again.
    image: Option<Image>,
    /// The last ruleset that this daemon brought into force.
    wanted: Option<Arc<Ruleset>>,
    /// The cgroup below which the policy's cgroups are looked up.
    base: Option<PathBuf>,
    /// The cgroups and network namespaces for which the maps were written.
    observed: Observed,
    /// The network namespaces that were seen last.
    namespaces: Namespaces,
    took: SwitchTimes,
}

/// How long the steps of a switch took.
#[derive(Clone, Copy, Debug, Default)]
pub struct SwitchTimes {
    /// Writing the new generation beside the old generation.
    pub write: Duration,
    /// The store that puts the new generation into force.
    pub flip: Duration,
    /// Waiting for programs that use the old generation, and removing it.
    pub sweep: Duration,
}

/// The epoch and the rule names of the ruleset in force.
#[derive(Clone, Debug, Default)]
pub struct AppliedRuleset {
    /// The epoch.
    pub epoch: u32,
    /// The names of the used rule slots.
    pub names: BTreeMap<u16, String>,
}

impl Apply {
    /// Reads what the pinned maps hold.
    pub fn new(maps: RulesetMaps) -> Result<Apply, ApplyError> {
        let image = read(&maps, None)?;
        Ok(Apply {
            maps,
            image: Some(image),
            wanted: None,
            base: None,
            observed: Observed::default(),
            namespaces: Namespaces::default(),
            took: SwitchTimes::default(),
        })
    }

    /// Sets the cgroup below which the policy's cgroups are looked up. Without it, none is found.
    pub fn below(mut self, base: &Path) -> Apply {
        self.base = Some(base.to_path_buf());
        self
    }

    /// The ruleset in force, which may come from an earlier daemon.
    pub fn in_force(&self) -> AppliedRuleset {
        self.image
            .as_ref()
            .map(|image| AppliedRuleset { epoch: image.epoch, names: image.names.clone() })
            .unwrap_or_default()
    }

    /// Brings a ruleset into force. If it is in force already, nothing changes and the epoch stays.
    pub fn apply(&mut self, ruleset: &Arc<Ruleset>) -> Result<AppliedRuleset, ApplyError> {
        let mut image = match self.image.take() {
            Some(image) => image,
            None => read(&self.maps, None)?,
        };
        let observed = self.observe(ruleset);
        let plan = plan(&image, ruleset, &observed)?;
        let started = Instant::now();
        let mut took = SwitchTimes::default();
        for ops in plan.ops.chunk_by(|one, next| discriminant(one) == discriminant(next)) {
            let before = started.elapsed();
            write(&mut self.maps, ops)?;
            ops.iter().for_each(|op| op.apply_to(&mut image));
            if matches!(ops, [MapOp::Activate(_), ..]) {
                took.write = before;
                took.flip = started.elapsed() - before;
            }
        }
        if took.flip > Duration::ZERO {
            took.sweep = started.elapsed() - took.write - took.flip;
            self.took = took;
        }
        self.image = Some(image);
        self.wanted = Some(Arc::clone(ruleset));
        self.observed = observed;
        Ok(self.in_force())
    }

    /// How long the steps of the last switch took.
    pub fn took(&self) -> SwitchTimes {
        self.took
    }

    /// Takes the network namespaces as they are now. The next [`Apply::follow`] or [`Apply::apply`] brings them into the maps.
    pub fn see(&mut self, namespaces: Namespaces) {
        self.namespaces = namespaces;
    }

    /// Updates the maps if cgroups or network namespaces came or went. Returns whether any did.
    pub fn follow(&mut self) -> Result<bool, ApplyError> {
        let Some(wanted) = self.wanted.clone() else { return Ok(false) };
        if self.observe(&wanted) == self.observed {
            return Ok(false);
        }
        self.apply(&wanted)?;
        Ok(true)
    }

    /// The last ruleset that this daemon brought into force, and the cgroups that it found for it.
    pub fn followed(&self) -> Option<(Arc<Ruleset>, Cgroups)> {
        self.wanted.clone().map(|wanted| (wanted, self.observed.cgroups.clone()))
    }

    fn observe(&self, ruleset: &Ruleset) -> Observed {
        let cgroups = self.base.as_ref().map(|base| find(base, ruleset)).unwrap_or_default();
        Observed { cgroups, namespaces: self.namespaces.clone() }
    }

    /// How full the tables are.
    pub fn map_use(&self) -> Vec<MapUse> {
        self.image.as_ref().map(of_image).unwrap_or_default()
    }

    /// What the maps hold, to judge open connections on the host.
    pub fn image(&self) -> Option<Image> {
        self.image.clone()
    }

    /// Compares the maps with what was written, and brings the ruleset into force again if someone else changed them. Returns whether that was
    /// necessary.
    pub fn mend(&mut self, look: MendScope) -> Result<bool, ApplyError> {
        let Some(wanted) = self.wanted.clone() else { return Ok(false) };
        let known = match look {
            MendScope::Deciding => self.image.as_ref(),
            MendScope::All => None,
        };
        let found = read(&self.maps, known)?;
        if self.image.as_ref() == Some(&found) {
            return Ok(false);
        }
        self.image = Some(found);
        self.apply(&wanted)?;
        Ok(true)
    }

    /// Whether the epoch that was written last is active and its generation complete.
    pub fn is_active(&self) -> bool {
        let Some(image) = &self.image else { return true };
        let generation = Active { epoch: image.epoch }.generation();
        self.maps.active.get(&0, 0).is_ok_and(|active| active.epoch == image.epoch)
            && self.maps.generations.get(&generation.into(), 0).is_ok_and(|found| found == image.generation(generation))
    }

    /// Carries out one operation outside any plan, so that tests can compare the maps with the host's tables. The next plan reads the maps again.
    pub fn carry_out(&mut self, op: &MapOp) -> Result<(), ApplyError> {
        self.image = None;
        write(&mut self.maps, std::slice::from_ref(op))
    }

    /// Takes over counters from the maps of another ABI, for rules of the same name.
    pub fn carry(&mut self, counts: &[CarriedCount]) -> Result<(), ApplyError> {
        let names = self.in_force().names;
        for CarriedCount { rule, reason, audited, packets } in counts {
            let slot = match rule {
                Some(rule) => names.iter().find(|(_, name)| *name == rule).map(|(slot, _)| *slot),
                None => Some(NO_RULE),
            };
            if let Some(slot) = slot {
                let index = counter_index(slot, *reason, *audited);
                self.maps.carried.set(index, *packets, 0).map_err(|error| ApplyError::Map("CARRIED", error))?;
            }
        }
        Ok(())
    }

    /// The counters of every used rule slot, and of packets that reached no rule, in the order of the slots: slot, reason, audited, packets.
    pub fn counters(&self) -> Result<Vec<(u16, Reason, bool, u64)>, ApplyError> {
        let slots = self.image.iter().flat_map(|image| image.names.keys().copied()).chain([NO_RULE]);
        let mut counters = Vec::new();
        for slot in slots {
            for reason in Reason::ALL.into_iter().filter(|reason| *reason != Reason::NotGuarded) {
                for audited in [false, true] {
                    let values = self
                        .maps
                        .counters
                        .get(&counter_index(slot, reason, audited), 0)
                        .map_err(|error| ApplyError::Map("COUNTERS", error))?;
                    let carried = self
                        .maps
                        .carried
                        .get(&counter_index(slot, reason, audited), 0)
                        .map_err(|error| ApplyError::Map("CARRIED", error))?;
                    counters.push((slot, reason, audited, values.iter().sum::<u64>() + carried));
                }
            }
        }
        Ok(counters)
    }
}

/// Carries out operations of one kind. Those on large maps are collected and written in batches.
fn write(maps: &mut RulesetMaps, ops: &[MapOp]) -> Result<(), ApplyError> {
    let mut pending = PendingWrites::default();
    for op in ops {
        match op {
            MapOp::Scope(key, value) => pending.scopes.push((*key, *value)),
            MapOp::PeerV4(key, value) => pending.peers_v4.push((*key, *value)),
            MapOp::PeerV6(key, value) => pending.peers_v6.push((*key, *value)),
            MapOp::Destination(key, value) => pending.destinations.push((*key, *value)),
            MapOp::Port(key, value) => pending.ports.push((*key, *value)),
            MapOp::ScopeCopy(key, value) => pending.scopes_copy.push((*key, *value)),
            MapOp::PortCopy(key, value) => pending.ports_copy.push((*key, *value)),
            MapOp::PortNumbers(index, value) => maps
                .port_numbers
                .set(*index, value.unwrap_or_default(), 0)
                .map_err(|error| ApplyError::Map("PORT_NUMBERS", error))?,
            MapOp::Name(slot, name) => {
                for reason in Reason::ALL {
                    for audited in [false, true] {
                        zero(maps, counter_index(*slot, reason, audited))?;
                    }
                }
                set_name(maps, *slot, name)?;
            }
            MapOp::Unname(slot) => set_name(maps, *slot, "")?,
            MapOp::Caller(key, value) => put(&mut maps.callers, "CALLERS", *key, *value)?,
            MapOp::Cgroup(key, value) => put(&mut maps.cgroups, "CGROUPS", *key, *value)?,
            MapOp::Namespace(key, value) => put(&mut maps.namespaces, "NAMESPACES", *key, *value)?,
            MapOp::Generation(number, value) => maps
                .generations
                .set(u32::from(*number), value.unwrap_or_default(), 0)
                .map_err(|error| ApplyError::Map("GENERATIONS", error))?,
            MapOp::Activate(epoch) => {
                maps.active.set(0, Active { epoch: *epoch }, 0).map_err(|error| ApplyError::Map("ACTIVE", error))?;
            }
            MapOp::Grace => syscalls::grace_period().map_err(ApplyError::Grace)?,
        }
    }
    bring_lpm(&maps.scopes, "SCOPES", &pending.scopes)?;
    bring_lpm(&maps.peers_v4, "PEERS_V4", &pending.peers_v4)?;
    bring_lpm(&maps.peers_v6, "PEERS_V6", &pending.peers_v6)?;
    bring_lpm(&maps.destinations, "DESTINATIONS", &pending.destinations)?;
    bring_lpm(&maps.scopes_copy, "SCOPES_COPY", &pending.scopes_copy)?;
    bring(&maps.ports_copy, "PORTS_COPY", pending.ports_copy.into_iter())?;
    bring(&maps.ports, "PORTS", pending.ports.into_iter())
}

/// Writes to a map: a value for a key, or `None` to remove the key.
type Writes<K, V> = Vec<(K, Option<V>)>;

/// The collected writes to the large maps.
#[derive(Default)]
struct PendingWrites {
    scopes: Writes<(u32, ScopeKey), ScopeValue>,
    peers_v4: Writes<(u32, PeerKey4), PeerValue>,
    peers_v6: Writes<(u32, PeerKey6), PeerValue>,
    destinations: Writes<(u32, DestinationKey), DestinationValue>,
    ports: Writes<PortKey, PortValue>,
    scopes_copy: Writes<(u32, ScopeKey), ScopeValue>,
    ports_copy: Writes<PortKey, PortValue>,
}

fn bring_lpm<K: aya::Pod, V: aya::Pod>(
    table: &LargeMap<Key<K>, V>,
    name: &'static str,
    entries: &[((u32, K), Option<V>)],
) -> Result<(), ApplyError> {
    bring(table, name, entries.iter().map(|((bits, key), value)| (Key::new(*bits, *key), *value)))
}

fn bring<K: aya::Pod, V: aya::Pod>(
    table: &LargeMap<K, V>,
    name: &'static str,
    entries: impl Iterator<Item = (K, Option<V>)>,
) -> Result<(), ApplyError> {
    let (mut gone, mut written) = (Vec::new(), Vec::new());
    for (key, value) in entries {
        match value {
            Some(value) => written.push((key, value)),
            None => gone.push(key),
        }
    }
    // Removals first, as planned, because they make room.
    table.remove(&gone).and_then(|()| table.put(&written)).map_err(refused(name))
}

fn set_name(maps: &mut RulesetMaps, slot: u16, name: &str) -> Result<(), ApplyError> {
    let result = maps.names.set(u32::from(slot), rule_name::write(name), 0);
    result.map_err(|error| ApplyError::Map("RULE_NAMES", error))
}

fn put<K: aya::Pod, V: aya::Pod>(
    map: &mut aya::maps::HashMap<aya::maps::MapData, K, V>,
    name: &'static str,
    key: K,
    value: Option<V>,
) -> Result<(), ApplyError> {
    match value {
        Some(value) => map.insert(key, value, 0),
        None => absent_is_fine(map.remove(&key)),
    }
    .map_err(|error| ApplyError::Map(name, error))
}

/// Removing an entry that someone else has removed is not an error.
fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Ok(()) | Err(_) => result,
    }
}

fn zero(maps: &mut RulesetMaps, index: u32) -> Result<(), ApplyError> {
    maps.carried.set(index, 0, 0).map_err(|error| ApplyError::Map("CARRIED", error))?;
    let cpus = maps.counters.get(&index, 0).map_err(|error| ApplyError::Map("COUNTERS", error))?.len();
    let zeros = PerCpuValues::try_from(vec![0u64; cpus])
        .map_err(|error| ApplyError::Map("COUNTERS", MapError::IoError(error)))?;
    maps.counters.set(index, zeros, 0).map_err(|error| ApplyError::Map("COUNTERS", error))
}
