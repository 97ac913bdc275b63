//! Owns how full the maps are and how long the programs ran.
//! Called by the daemon and by `report`, for `status` and the metrics.
//! Must never cost what it measures: what the daemon wrote is known, the rest is counted in batches and not on every scrape.

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use aya::{Pod, maps::MapData, programs::ProgramInfo};
use guard_common::abi::{
    Asked, AskedKey, FlowKey, MAX_ASKED, MAX_CALLERS, MAX_COOKIES, MAX_DESTINATIONS, MAX_NAMESPACES, MAX_PEERS,
    MAX_PINHOLES, MAX_PORTS, MAX_RULES, MAX_SCOPES, Pinhole, UDP_FLOW_SECONDS,
};
use guard_policy::tables::image::Image;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernel::{
    error::LoadError,
    links::{edge_hooks::EDGE_PROGRAMS, object::PROGRAMS},
    pins::pins,
    tables::map_batches::{BatchResult, lookup_batch},
};

/// How old a count may be.
const FRESH: Duration = Duration::from_secs(5);
/// Entries of one batch.
const BATCH: usize = 4096;

/// The tables that the programs write, and how many entries each has.
pub struct MapCounter {
    tables: Vec<CountedMap>,
    counted: Option<(Instant, Vec<MapUse>)>,
    /// Keeps the kernel measuring its programs.
    _measuring: Option<OwnedFd>,
}

struct CountedMap {
    name: &'static str,
    map: MapData,
    /// Counts the entries, with keys and values of this table's kind.
    count: fn(&CountedMap, u32) -> io::Result<u64>,
    capacity: u32,
}

impl MapCounter {
    /// Opens the pinned tables. `measure` has the kernel measure its programs, where it lets this process ask for that.
    pub fn open(bpffs: &Path, measure: bool) -> Result<MapCounter, LoadError> {
        type Count = fn(&CountedMap, u32) -> io::Result<u64>;
        let of_flows: Count = |map, _| map.count::<FlowKey, Pinhole>(|_| true);
        let of_cookies: Count = |map, _| map.count::<u64, Pinhole>(|_| true);
        let of_asked: Count =
            |map, now| map.count::<AskedKey, Asked>(|asked| now.wrapping_sub(asked.at) <= UDP_FLOW_SECONDS);
        // A table from which the oldest entry makes room is not full: OPENED, SENT and CONNECTING are not counted.
        let tables = [
            ("PINHOLES", of_flows, MAX_PINHOLES),
            ("COOKIES", of_cookies, MAX_COOKIES),
            ("ASKED", of_asked, MAX_ASKED),
            ("ASKED_BY_PODS", of_asked, MAX_ASKED),
        ];
        let open = |(name, count, capacity)| {
            let map = MapData::from_pin(pins(bpffs).join("maps").join(name))?;
            Ok(CountedMap { name, map, count, capacity })
        };
        let tables = tables.into_iter().map(open).collect::<Result<_, LoadError>>()?;
        let measuring = measure.then(|| aya::sys::enable_stats(aya::sys::Stats::RunTime)).and_then(|measuring| {
            let told = measuring.inspect_err(|error| {
                tracing::warn!(%error, "--program-stats: the kernel does not measure its programs (it takes CAP_SYS_ADMIN, or the sysctl kernel.bpf_stats_enabled)");
            });
            told.ok()
        });
        Ok(MapCounter { tables, counted: None, _measuring: measuring })
    }

    /// How full the tables are that the programs write, counted at most every few seconds.
    pub fn tables(&mut self) -> Vec<MapUse> {
        if let Some((at, counted)) = &self.counted
            && at.elapsed() < FRESH
        {
            return counted.clone();
        }
        let now = seconds();
        let count = |table: &CountedMap| {
            let entries =
                (table.count)(table, now).inspect_err(|error| tracing::warn!(map = table.name, %error, "not counted"));
            Some(MapUse { name: table.name.to_owned(), entries: entries.ok()?, capacity: table.capacity.into() })
        };
        let counted: Vec<MapUse> = self.tables.iter().filter_map(count).collect();
        self.counted = Some((Instant::now(), counted.clone()));
        counted
    }
}

impl CountedMap {
    /// The entries that count.
    fn count<K: Pod, V: Pod>(&self, counts: impl Fn(&V) -> bool) -> io::Result<u64> {
        let lives = |(_, entry): &&(K, V)| counts(entry);
        let (mut entries, mut place) = (0, None);
        // Entries come and go meanwhile: no more rounds than a full table takes.
        for _ in 0..=self.capacity as usize / BATCH * 2 {
            let (found, result) = lookup_batch(self.map.fd(), &mut place, BATCH);
            entries += found.iter().filter(lives).count() as u64;
            match result {
                BatchResult::Done(_) => {}
                BatchResult::Stopped(_, error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                BatchResult::Stopped(_, error) => return Err(error),
                BatchResult::Unknown => return Err(io::ErrorKind::Unsupported.into()),
            }
        }
        Ok(entries)
    }
}

/// How full the ruleset's tables are: the half of each that one ruleset may use.
pub fn of_image(image: &Image) -> Vec<MapUse> {
    let entries = &image.entries;
    let followed = &entries.followed;
    let tables = [
        ("RULE_NAMES", image.names.len(), MAX_RULES),
        ("PORTS", entries.ports.len(), MAX_PORTS / 2),
        ("SCOPES", entries.scopes.len(), MAX_SCOPES / 2),
        ("PEERS_V4", entries.peers_v4.len(), MAX_PEERS / 2),
        ("PEERS_V6", entries.peers_v6.len(), MAX_PEERS / 2),
        ("CALLERS", followed.callers.len(), MAX_CALLERS / 2),
        ("CGROUPS", followed.cgroups.len(), MAX_CALLERS / 2),
        ("NAMESPACES", followed.namespaces.len(), MAX_NAMESPACES / 2),
        ("DESTINATIONS", entries.destinations.len(), MAX_DESTINATIONS / 2),
    ];
    let table = |(name, entries, capacity): (&str, usize, u32)| MapUse {
        name: name.to_owned(),
        entries: entries as u64,
        capacity: capacity.into(),
    };
    tables.map(table).into()
}

/// How often and how long each pinned program ran; nothing where the kernel does not measure.
pub fn programs(bpffs: &Path) -> Vec<ProgramUse> {
    let directory = pins(bpffs).join("programs");
    let of = |name: &str| {
        let info = ProgramInfo::from_pin(directory.join(name)).ok().filter(|info| info.run_count() > 0)?;
        Some(ProgramUse { name: name.to_owned(), runs: info.run_count(), seconds: info.run_time().as_secs_f64() })
    };
    PROGRAMS.into_iter().chain(EDGE_PROGRAMS).filter_map(of).collect()
}

/// Seconds of `CLOCK_MONOTONIC`, as the programs read them.
fn seconds() -> u32 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(|now| now.tv_sec() as u32).unwrap_or_default()
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MapUse {
    /// The map.
    pub name: String,
    /// The number of entries in use.
    pub entries: u64,
    /// The number of entries it can have; for a table of a ruleset, the number that one ruleset can have.
    pub capacity: u64,
}

impl MapUse {
    /// How full it is, in percent.
    pub fn percent(&self) -> u64 {
        self.entries.saturating_mul(100) / self.capacity.max(1)
    }
}

/// How often and how long a program ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProgramUse {
    /// The program.
    pub name: String,
    /// The number of runs.
    pub runs: u64,
    /// How long all runs took, in seconds.
    pub seconds: f64,
}
