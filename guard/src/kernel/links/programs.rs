//! Owns the pinned state: opens or adopts the maps, loads the programs, attaches or adopts the links.
//! Called by `app` at start (`open`, then `apply`, then `attach`), by `status` and `unpin` (`attachments`).
//! Must never attach before a ruleset is in force, and never reuse a pinned map of another shape.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, MapData, MapError, MapInfo, PerCpuArray, RingBuf},
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program, ProgramError, ProgramInfo, SockOps, links::FdLink},
};
use guard_common::abi::Pinhole;

use crate::kernel::{
    error::{LoadError, at},
    links::{
        map_definition::MapDefinition,
        object::{JUDGES, OBJECT, PROGRAMS},
        upgrade::Predecessor,
    },
    pins::{Location, pins},
    syscalls,
    tables::{
        ruleset_maps,
        ruleset_maps::{RulesetMaps, pinned_map},
    },
};

/// The kernel half, opened: what `app` hands out to its parts.
pub struct KernelHalf {
    /// For `apply` and `counters`.
    pub maps: RulesetMaps,
    /// For `counters`: what the kernel half could not do.
    pub health: PerCpuArray<MapData, u64>,
    /// For `events`.
    pub events: RingBuf<MapData>,
    /// For `pinholes`.
    pub cookies: HashMap<MapData, u64, Pinhole>,
    /// For `attach`.
    pub programs: Programs,
}

/// The programs, loaded and not yet attached.
pub struct Programs {
    pub(crate) ebpf: Ebpf,
    pub(crate) location: Location,
    /// A handle on every pinned map, so that a lost pin can be made again.
    pub(crate) pinned: Vec<(String, MapData)>,
    /// The same for every link: without it, removing a pin would detach the program.
    pub(crate) links: Vec<CgroupLink>,
    /// The same for the edge tier's.
    pub(crate) edge: crate::kernel::links::edge_hooks::EdgeHandles,
    /// Whether cgroup_skb programs can ask for the network namespace here (kernel 6.15).
    pub netns_helper: bool,
}

/// A link that is held open.
pub(crate) struct CgroupLink {
    pub(crate) name: &'static str,
    pub(crate) fd: OwnedFd,
    /// The program that was put into it.
    pub(crate) program_id: u32,
}

/// Whether a program holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The program.
    pub name: String,
    /// Whether its link is there and attached.
    pub attached: bool,
    /// The link's id.
    pub link_id: Option<u32>,
    /// The id of the program in the link.
    pub program_id: Option<u32>,
}

/// A pinned map.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PinnedMap {
    /// The map.
    pub name: String,
    /// Its id.
    pub id: u32,
}

/// Opens the maps (pinned ones are adopted after a check of their shape) and loads the programs. Attaches nothing.
pub fn open(location: &Location) -> Result<KernelHalf, LoadError> {
    let pins = location.pins();
    make_directories(&location.bpffs, &pins)?;
    let map_names = check_definitions(&pins)?;
    let (ebpf, netns_helper) = load_programs(&pins, &map_names)?;
    #[cfg(feature = "ebpf-log")]
    let ebpf = crate::kernel::links::program_log::start(ebpf);
    let handle = |name: &String| Ok((name.clone(), MapData::from_pin(pins.join("maps").join(name))?));
    let pinned = map_names.iter().map(handle).collect::<Result<_, MapError>>()?;
    let (links, edge) = (Vec::new(), crate::kernel::links::edge_hooks::EdgeHandles::default());
    Ok(KernelHalf {
        maps: RulesetMaps::pinned(&location.bpffs)?,
        health: PerCpuArray::try_from(pinned_map(&pins, "HEALTH")?)?,
        events: RingBuf::try_from(pinned_map(&pins, "EVENTS")?)?,
        cookies: HashMap::try_from(pinned_map(&pins, "COOKIES")?)?,
        programs: Programs { ebpf, location: location.clone(), pinned, links, edge, netns_helper },
    })
}

impl Programs {
    /// Attaches each program, or adopts its pinned link: a link that holds an older program gets this one in one step and
    /// keeps its id. So does the link of a build of another ABI; what that build left besides comes back.
    pub fn attach(&mut self) -> Result<Vec<Predecessor>, LoadError> {
        let pins = self.location.pins();
        let predecessors = Predecessor::find(&self.location.bpffs)?;
        let cgroup = fs::File::open(&self.location.cgroup).map_err(at(&self.location.cgroup))?;
        let cgroup_id = cgroup.metadata().map_err(at(&self.location.cgroup))?.ino();
        self.links.clear();
        let mut renewed = false;
        for name in PROGRAMS {
            let link_pin = pins.join("links").join(name);
            let program_pin = pins.join("programs").join(name);
            let program = self.ebpf.program_mut(name).ok_or(LoadError::Missing(name))?;
            if name == JUDGES[0] {
                // From here on this build's pinholes are those that count.
                predecessors.iter().try_for_each(|before| before.carry_pinholes(&pins))?;
            }
            for before in predecessors.iter().filter(|_| !link_pin.exists()) {
                before.hand_over(
                    name,
                    program.fd().map_err(|error| LoadError::Program(name, error.to_string()))?.as_fd(),
                    cgroup_id,
                    &link_pin,
                )?;
            }
            if link_pin.exists() {
                adopt(name, program, &link_pin, &program_pin, cgroup_id, &self.location.cgroup)?;
            } else {
                attach_new(name, program, &cgroup, &link_pin)?;
                replace_pin(program, &program_pin)?;
                renewed |= JUDGES.contains(&name);
                tracing::info!(program = name, cgroup = %self.location.cgroup.display(), "program attached and pinned");
            }
            let fd = syscalls::obj_get(&link_pin).map_err(at(&link_pin))?;
            let program_id = syscalls::link_info(fd.as_fd()).map_err(at(&link_pin))?.program_id;
            self.links.push(CgroupLink { name, fd, program_id });
        }
        renewed.then(|| ruleset_maps::forget_judged(&pins)).transpose()?;
        Ok(predecessors)
    }

    /// How many instructions the verifier walked for a program; 0 where the kernel does not tell (before 5.16).
    pub fn verified(&self, name: &str) -> u32 {
        let info = self.ebpf.program(name).and_then(|program| program.info().ok());
        info.and_then(|info| info.verified_instruction_count()).unwrap_or(0)
    }
}

/// Which programs hold, read from the pins alone: the daemon need not run.
pub fn attachments(bpffs: &Path) -> Vec<Attachment> {
    let links = pins(bpffs).join("links");
    PROGRAMS
        .iter()
        .map(|name| {
            let info = syscalls::obj_get(&links.join(name)).and_then(|link| syscalls::link_info(link.as_fd())).ok();
            Attachment {
                name: (*name).to_owned(),
                attached: info.is_some_and(|info| info.cgroup_id != 0),
                link_id: info.map(|info| info.id),
                program_id: info.map(|info| info.program_id),
            }
        })
        .collect()
}

/// The pinned maps with their ids, in the order of their names.
pub fn pinned_maps(bpffs: &Path) -> Vec<PinnedMap> {
    let directory = pins(bpffs).join("maps");
    let mut maps: Vec<PinnedMap> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(PinnedMap { name, id: MapInfo::from_pin(entry.path()).ok()?.id() })
        })
        .collect();
    maps.sort_by(|a, b| a.name.cmp(&b.name));
    maps
}

fn make_directories(bpffs: &Path, pins: &Path) -> Result<(), LoadError> {
    // The directory itself may not exist yet; then its nearest existing parent says which file system it will be on.
    let existing = bpffs.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !syscalls::is_bpffs(existing).map_err(at(existing))? {
        return Err(LoadError::NotBpffs(bpffs.to_path_buf()));
    }
    for kind in ["maps", "programs", "links"] {
        let directory = pins.join(kind);
        fs::create_dir_all(&directory).map_err(at(&directory))?;
    }
    Ok(())
}

/// Compares every pinned map with its definition in the object; the loader itself would silently take any.
fn check_definitions(pins: &Path) -> Result<Vec<String>, LoadError> {
    let definitions = MapDefinition::of_object()?;
    for (name, expected) in &definitions {
        let path = pins.join("maps").join(name);
        if !path.exists() {
            continue;
        }
        let found = MapDefinition::of_pin(&path)?;
        if found != *expected {
            let (found, expected) = (found.to_string(), expected.to_string());
            return Err(LoadError::MapMismatch { path, found, expected });
        }
    }
    Ok(definitions.into_keys().collect())
}

/// Loads with the network-namespace helper, and without it where the kernel does not know it for cgroup_skb.
fn load_programs(pins: &Path, map_names: &[String]) -> Result<(Ebpf, bool), LoadError> {
    match load_programs_with(pins, map_names, true) {
        Ok(ebpf) => Ok((ebpf, true)),
        Err(LoadError::Program(..)) => load_programs_with(pins, map_names, false).map(|ebpf| (ebpf, false)),
        Err(error) => Err(error),
    }
}

fn load_programs_with(pins: &Path, map_names: &[String], netns_helper: bool) -> Result<Ebpf, LoadError> {
    let node_netns = syscalls::netns_cookie().map_err(at(Path::new("/proc/self/ns/net")))?;
    let netns_helper = u32::from(netns_helper);
    let mut loader = EbpfLoader::new();
    loader.override_global("NODE_NETNS", &node_netns, true).override_global("NETNS_HELPER", &netns_helper, true);
    for name in map_names {
        loader.map_pin_path(name, pins.join("maps").join(name));
    }
    let mut ebpf = loader.load(OBJECT)?;
    for name in PROGRAMS {
        let program = ebpf.program_mut(name).ok_or(LoadError::Missing(name))?;
        load_program(program).map_err(|error| LoadError::Program(name, verifier_tail(&error)))?;
    }
    Ok(ebpf)
}

fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    if let Program::CgroupSkb(program) = program {
        return program.load();
    }
    if let Program::CgroupSockAddr(program) = program {
        return program.load();
    }
    <&mut SockOps>::try_from(program)?.load()
}

/// The end of a verifier log says what was refused; the rest is thousands of lines of how it got there.
pub(crate) fn verifier_tail(error: &ProgramError) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

fn attach_new(name: &'static str, program: &mut Program, cgroup: &fs::File, pin: &Path) -> Result<(), LoadError> {
    let failed = |error: ProgramError| LoadError::Program(name, format!("cannot attach: {error}"));
    // `Single` is how the library spells "no flags"; links of a cgroup are always many.
    let mode = CgroupAttachMode::Single;
    let link = if let Program::CgroupSkb(program) = program {
        let direction = program.expected_attach_type().unwrap_or(CgroupSkbAttachType::Ingress);
        let id = program.attach(cgroup, direction, mode).map_err(failed)?;
        FdLink::try_from(program.take_link(id).map_err(failed)?)
    } else if let Program::CgroupSockAddr(program) = program {
        let id = program.attach(cgroup, mode).map_err(failed)?;
        FdLink::try_from(program.take_link(id).map_err(failed)?)
    } else {
        let program = <&mut SockOps>::try_from(program).map_err(failed)?;
        let id = program.attach(cgroup, mode).map_err(failed)?;
        FdLink::try_from(program.take_link(id).map_err(failed)?)
    };
    let link = link.map_err(|error| LoadError::Program(name, error.to_string()))?;
    link.pin(pin).map(drop).map_err(|error| LoadError::Pin(pin.to_path_buf(), error))
}

/// Takes over a pinned link. The program in it stays if it is the same code, else it is replaced in one step.
fn adopt(
    name: &'static str,
    program: &mut Program,
    link_pin: &Path,
    program_pin: &Path,
    cgroup_id: u64,
    cgroup: &Path,
) -> Result<(), LoadError> {
    let link = syscalls::obj_get(link_pin).map_err(at(link_pin))?;
    let info = syscalls::link_info(link.as_fd()).map_err(at(link_pin))?;
    if info.cgroup_id != cgroup_id {
        return Err(LoadError::OtherCgroup { path: link_pin.to_path_buf(), cgroup: cgroup.to_path_buf() });
    }
    let refused = |error: ProgramError| LoadError::Program(name, error.to_string());
    let tag = program.info().map_err(refused)?.tag();
    let pinned = ProgramInfo::from_pin(program_pin).ok();
    if pinned.is_some_and(|pinned| pinned.id() == info.program_id && pinned.tag() == tag) {
        tracing::info!(program = name, link = info.id, "pinned link adopted");
        return Ok(());
    }
    let fd = program.fd().map_err(refused)?;
    syscalls::link_update(link.as_fd(), fd.as_fd()).map_err(at(link_pin))?;
    tracing::info!(program = name, link = info.id, "program replaced in its pinned link");
    replace_pin(program, program_pin)
}

pub(crate) fn replace_pin(program: &mut Program, pin: &Path) -> Result<(), LoadError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(pin)(error)),
        Ok(()) | Err(_) => {}
    }
    program.pin(pin).map_err(|error| LoadError::Pin(pin.to_path_buf(), error))
}
