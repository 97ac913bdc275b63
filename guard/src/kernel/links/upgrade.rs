//! Owns taking over from a build of another ABI: its links get this build's programs, and the log names its maps that cannot be read.
//! Called by `programs` while it attaches, when the ruleset is in this build's maps, and by `daemon/run` when all programs are attached.
//! Must never detach anything before this build's programs are attached, or read a map by a definition that it does not have.
//!
//! A crash at any point leaves every link with a program of one of the two builds, and the next start continues from there.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, PerCpuArray};
use guard_common::{
    Reason,
    abi::{ABI, FlowKey, NO_RULE, Pinhole, RULE_SLOTS, RuleName, counter_index},
};

use crate::kernel::{
    error::{LoadError, at},
    links::map_definition::MapDefinition,
    pinholes::OpenPinholes,
    syscalls,
    tables::ruleset_maps::{pinned_map, rule_name},
};

/// The pins of a build of another ABI.
#[derive(Debug)]
pub struct Predecessor {
    directory: PathBuf,
    /// The maps that this build can read, because their definitions are the same.
    readable: Vec<String>,
}

/// A counter of the other build.
#[derive(Clone, Debug)]
pub struct CarriedCount {
    /// The name of the rule; `None` counts packets that reached no rule.
    pub rule: Option<String>,
    /// The reason of the decision.
    pub reason: Reason,
    /// Whether the rule only audited.
    pub audited: bool,
    /// How many packets were counted.
    pub packets: u64,
}

impl Predecessor {
    /// Finds the pin directories of other ABIs, the lowest number first. Logs each map that cannot be read.
    pub(crate) fn find(bpffs: &Path) -> Result<Vec<Predecessor>, LoadError> {
        let expected = MapDefinition::of_object().map_err(LoadError::Object)?;
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(bpffs).map_err(at(bpffs))?.flatten() {
            let number = entry.file_name().to_str().and_then(|name| name.strip_prefix('v')?.parse::<u32>().ok());
            if let Some(number) = number.filter(|number| *number != ABI) {
                found.insert(number, Predecessor::open(entry.path(), number, &expected)?);
            }
        }
        Ok(found.into_values().collect())
    }

    fn open(
        directory: PathBuf,
        number: u32,
        expected: &BTreeMap<String, MapDefinition>,
    ) -> Result<Predecessor, LoadError> {
        let mut readable = Vec::new();
        for path in entries(&directory.join("maps"))? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let found = MapDefinition::of_pin(&path)?;
            match expected.get(name) {
                Some(shape) if *shape == found => readable.push(name.to_owned()),
                Some(shape) => tracing::warn!(
                    map = name,
                    abi = number,
                    %found,
                    expected = %shape,
                    "ignoring a map of another ABI, because its definition differs"
                ),
                None => {
                    tracing::warn!(map = name, abi = number, %found, "ignoring a map of another ABI, because this build has none of that name")
                }
            }
        }
        tracing::info!(abi = number, own = ABI, "taking over from a build of another ABI");
        Ok(Predecessor { directory, readable })
    }

    /// Puts this build's program into the link of the same name and moves the pin here. The link keeps its id, and the hook is never empty.
    /// If the link does not accept the program, nothing changes: the program gets a new link beside the old one.
    pub(crate) fn hand_over(
        &self,
        name: &'static str,
        program: BorrowedFd<'_>,
        cgroup_id: u64,
        pin: &Path,
    ) -> Result<(), LoadError> {
        let old = self.directory.join("links").join(name);
        let Ok(link) = syscalls::obj_get(&old) else { return Ok(()) };
        let info = syscalls::link_info(link.as_fd()).map_err(at(&old))?;
        if info.cgroup_id != cgroup_id {
            return Ok(());
        }
        match syscalls::link_update(link.as_fd(), program) {
            Ok(()) => fs::rename(&old, pin).map_err(at(&old)),
            Err(error) => {
                tracing::warn!(program = name, link = info.id, %error, "the link of another ABI does not accept this build's program; attaching a new link beside it");
                Ok(())
            }
        }
    }

    /// The directory of the pinned links.
    pub(crate) fn links(&self) -> PathBuf {
        self.directory.join("links")
    }

    /// The same for a link of the edge tier, whose pin has the same name in every ABI.
    pub(crate) fn hand_over_edge(&self, program: BorrowedFd<'_>, pin: &Path) -> Result<(), LoadError> {
        let Some(name) = pin.file_name().filter(|_| !pin.exists()) else { return Ok(()) };
        let old = self.links().join(name);
        let link = syscalls::obj_get(&old).map_err(at(&old))?;
        syscalls::link_update(link.as_fd(), program).map_err(at(&old))?;
        fs::rename(&old, pin).map_err(at(&old))
    }

    /// Copies the pinholes of handshakes in progress.
    pub(crate) fn carry_pinholes(&self, pins: &Path) -> Result<(), LoadError> {
        if !self.can_read("PINHOLES") {
            tracing::warn!("cannot read the pinholes of another ABI: handshakes in progress must be repeated");
            return Ok(());
        }
        syscalls::grace_period().map_err(at(&self.directory))?;
        // An older build has only the first of these tables.
        for table in ["PINHOLES", "OPENED"].into_iter().filter(|table| self.can_read(table)) {
            let old: HashMap<_, FlowKey, Pinhole> = pinned_map(&self.directory, table)?.try_into()?;
            let mut new = OpenPinholes::pinned(pins, table)?;
            for (flow, pinhole) in old.iter().flatten() {
                new.insert(flow, pinhole)?;
            }
        }
        Ok(())
    }

    /// Reads the counters; empty if the maps cannot be read.
    pub fn counts(&self) -> Result<Vec<CarriedCount>, LoadError> {
        if !["RULE_NAMES", "COUNTERS", "CARRIED"].iter().all(|name| self.can_read(name)) {
            tracing::warn!("cannot read the counters of another ABI: counters start at zero");
            return Ok(Vec::new());
        }
        // Wait until the last packet that an old program judged is counted.
        syscalls::grace_period().map_err(at(&self.directory))?;
        let names: Array<_, RuleName> = pinned_map(&self.directory, "RULE_NAMES")?.try_into()?;
        let counters: PerCpuArray<_, u64> = pinned_map(&self.directory, "COUNTERS")?.try_into()?;
        let carried: Array<_, u64> = pinned_map(&self.directory, "CARRIED")?.try_into()?;
        let mut counts = Vec::new();
        for slot in 0..=RULE_SLOTS as u16 {
            let name = if slot == NO_RULE { None } else { rule_name::read(&names.get(&u32::from(slot), 0)?) };
            if name.is_none() && slot != NO_RULE {
                continue;
            }
            for reason in Reason::ALL {
                for audited in [false, true] {
                    let index = counter_index(slot, reason, audited);
                    let packets = counters.get(&index, 0)?.iter().sum::<u64>() + carried.get(&index, 0)?;
                    counts.push(CarriedCount { rule: name.clone(), reason, audited, packets });
                }
            }
        }
        Ok(counts)
    }

    /// Removes the remaining pins: links for which this build has no program, programs and maps.
    pub fn remove(self) -> Result<(), LoadError> {
        remove(&self.directory).map(drop).map_err(at(&self.directory))
    }

    fn can_read(&self, map: &str) -> bool {
        self.readable.iter().any(|name| name == map)
    }
}

/// The pin directories of all ABIs below `--bpffs`.
pub(crate) fn directories(bpffs: &Path) -> io::Result<Vec<PathBuf>> {
    let is_one = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()?.strip_prefix('v')?.parse::<u32>().ok()).is_some()
    };
    Ok(entries_of(bpffs)?.into_iter().filter(is_one).collect())
}

/// Removes a pin directory, links first: enforcement ends with the last of them. Returns the removed pins.
pub(crate) fn remove(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for kind in ["links", "programs", "maps"] {
        let kind = directory.join(kind);
        for path in entries_of(&kind)? {
            fs::remove_file(&path)?;
            removed.push(path);
        }
        if kind.exists() {
            fs::remove_dir(&kind)?;
        }
    }
    fs::remove_dir(directory)?;
    Ok(removed)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    entries_of(directory).map_err(at(directory))
}

/// The entries of a directory; none if it does not exist.
fn entries_of(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
