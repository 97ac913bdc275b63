//! Owns the programs and the pins: opens or adopts the maps, loads the programs, attaches or adopts the links.
//! Called by `daemon/run` at start (`open`, then `Apply::apply`, then `attach`), by `mend`, by `daemon/state` and by `report`.
//! Must never attach before a ruleset is in force, or reuse a pinned map of another definition.

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
    maps::{Array, HashMap, MapData, MapError, MapInfo, PerCpuArray, RingBuf},
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program, ProgramError, ProgramInfo, SockOps, links::FdLink},
};
use guard_common::abi::{LoadedFacts, Pinhole};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernel::{
    error::{LoadError, LoadRefusal, at},
    links::{
        earlier_sockets,
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

/// The opened kernel half, in the parts that `daemon/run` distributes.
pub struct KernelHalf {
    /// The maps of the ruleset, for `apply`.
    pub maps: RulesetMaps,
    /// The counters of what the programs could not do.
    pub health: PerCpuArray<MapData, u64>,
    /// The ring buffer of denials, for `events`.
    pub events: RingBuf<MapData>,
    /// The table of registered sockets, for `pinholes`.
    pub cookies: HashMap<MapData, u64, Pinhole>,
    /// The loaded programs.
    pub programs: Programs,
}

/// The loaded programs and the links of those that are attached.
pub struct Programs {
    pub(crate) ebpf: Ebpf,
    pub(crate) location: Location,
    /// A descriptor of every pinned map, so that a lost pin can be restored.
    pub(crate) pinned: Vec<(String, MapData)>,
    /// The links of the programs. An open descriptor keeps a program attached when its pin is removed.
    pub(crate) links: Vec<CgroupLink>,
    /// The links of the edge tier.
    pub(crate) edge: crate::kernel::links::edge_hooks::EdgeHandles,
    /// Whether the kernel lets cgroup_skb programs read the cookie of the network namespace (Linux 6.15).
    pub netns_helper: bool,
    /// Whether it is known whose the node's sockets are that were there before the programs.
    pub knows_earlier_sockets: bool,
    /// What the programs were loaded with.
    facts: LoadedFacts,
}

/// The open link of a program on the cgroup.
pub(crate) struct CgroupLink {
    pub(crate) name: &'static str,
    pub(crate) fd: OwnedFd,
    /// The id of the program that was put into the link.
    pub(crate) program_id: u32,
}

/// Whether a program is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The program.
    pub name: String,
    /// Whether its link exists and is attached.
    pub attached: bool,
    /// The link's id.
    pub link_id: Option<u32>,
    /// The id of the program in the link.
    pub program_id: Option<u32>,
}

/// A pinned map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PinnedMap {
    /// The map.
    pub name: String,
    /// Its id.
    pub id: u32,
}

/// How the programs find the network namespace of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceBy {
    /// The kernel tells it (Linux 6.15).
    Cookie,
    /// By a note on the socket, made when it began to listen or to send.
    Mark,
}

/// Opens the maps and loads the programs. Pinned maps are adopted after a check of their definitions. Attaches nothing.
pub fn open(location: &Location) -> Result<KernelHalf, LoadError> {
    let pins = location.pins();
    make_directories(&location.bpffs, &pins)?;
    let map_names = check_definitions(&pins)?;
    let (ebpf, facts) = load_programs(&pins, &map_names)?;
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
        programs: Programs {
            ebpf,
            location: location.clone(),
            pinned,
            links,
            edge,
            netns_helper: facts.has_netns_helper != 0,
            knows_earlier_sockets: true,
            facts,
        },
    })
}

impl Programs {
    /// Attaches each program, or adopts its pinned link. A link with an older program gets the new one in one step and keeps its id; so does the
    /// link of a build of another ABI. Returns the builds that were taken over, so that the caller can remove what is left of them.
    pub fn attach(&mut self) -> Result<Vec<Predecessor>, LoadError> {
        let pins = self.location.pins();
        let predecessors = Predecessor::find(&self.location.bpffs)?;
        let cgroup = fs::File::open(&self.location.cgroup).map_err(at(&self.location.cgroup))?;
        let cgroup_id = cgroup.metadata().map_err(at(&self.location.cgroup))?.ino();
        self.links.clear();
        let mut renewed = false;
        let mut loaded: Array<MapData, LoadedFacts> = pinned_map(&pins, "LOADED")?.try_into()?;
        let may_adopt = loaded.get(&0, 0)? == self.facts;
        for name in PROGRAMS {
            let link_pin = pins.join("links").join(name);
            let program_pin = pins.join("programs").join(name);
            let program = self.ebpf.program_mut(name).ok_or(LoadError::Missing(name))?;
            if name == JUDGES[0] {
                // From here on, this build's programs judge packets, so they need the open pinholes.
                predecessors.iter().try_for_each(|before| before.carry_pinholes(&pins))?;
                if !self.netns_helper {
                    self.knows_earlier_sockets = earlier_sockets::tell(&pins)?;
                }
            }
            for before in predecessors.iter().filter(|_| !link_pin.exists()) {
                let fd = program.fd().map_err(|error| LoadError::Program(name, error))?;
                before.hand_over(name, fd.as_fd(), cgroup_id, &link_pin)?;
            }
            if link_pin.exists() {
                adopt(name, program, &link_pin, &program_pin, cgroup_id, &self.location.cgroup, may_adopt)?;
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
        loaded.set(0, self.facts, 0)?;
        renewed.then(|| ruleset_maps::forget_judged(&pins)).transpose()?;
        Ok(predecessors)
    }

    /// The number of instructions that the verifier processed for a program; 0 if the kernel does not report it (before Linux 5.16).
    pub fn verified(&self, name: &str) -> u32 {
        let info = self.ebpf.program(name).and_then(|program| program.info().ok());
        info.and_then(|info| info.verified_instruction_count()).unwrap_or(0)
    }
}

/// Which programs are attached, read from the pins. This does not need a running daemon.
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
    // If the directory does not exist yet, its nearest existing parent tells the file system.
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

/// Compares every pinned map with its definition in the object, because the library would adopt any pinned map.
fn check_definitions(pins: &Path) -> Result<Vec<String>, LoadError> {
    let definitions = MapDefinition::of_object().map_err(LoadError::Object)?;
    for (name, expected) in &definitions {
        let path = pins.join("maps").join(name);
        if !path.exists() {
            continue;
        }
        let found = MapDefinition::of_pin(&path)?;
        if found != *expected {
            return Err(LoadError::MapMismatch { path, found, expected: *expected });
        }
    }
    Ok(definitions.into_keys().collect())
}

/// Loads the programs with the helper for network namespaces, or without it if the kernel does not allow it for cgroup_skb.
fn load_programs(pins: &Path, map_names: &[String]) -> Result<(Ebpf, LoadedFacts), LoadError> {
    let node_netns = syscalls::netns_cookie().map_err(at(Path::new("/proc/self/ns/net")))?;
    let with = |has_netns_helper| {
        let facts = LoadedFacts { node_netns, has_netns_helper };
        load_programs_with(pins, map_names, facts).map(|ebpf| (ebpf, facts))
    };
    match with(1) {
        Err(LoadError::Load(..)) => with(0),
        other => other,
    }
}

fn load_programs_with(pins: &Path, map_names: &[String], facts: LoadedFacts) -> Result<Ebpf, LoadError> {
    let netns_helper = u32::from(facts.has_netns_helper != 0);
    let mut loader = EbpfLoader::new();
    loader.override_global("NODE_NETNS", &facts.node_netns, true).override_global("NETNS_HELPER", &netns_helper, true);
    for name in map_names {
        loader.map_pin_path(name, pins.join("maps").join(name));
    }
    let mut ebpf = loader.load(OBJECT)?;
    for name in PROGRAMS {
        let program = ebpf.program_mut(name).ok_or(LoadError::Missing(name))?;
        load_program(program).map_err(|error| LoadError::Load(name, LoadRefusal(error)))?;
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
    if let Program::CgroupSock(program) = program {
        return program.load();
    }
    <&mut SockOps>::try_from(program)?.load()
}

fn attach_new(name: &'static str, program: &mut Program, cgroup: &fs::File, pin: &Path) -> Result<(), LoadError> {
    let failed = |error| LoadError::Attach(name, error);
    // `Single` means "no flags" in the library. A cgroup always accepts several links.
    let mode = CgroupAttachMode::Single;
    let link = if let Program::CgroupSkb(program) = program {
        let direction = program.expected_attach_type().unwrap_or(CgroupSkbAttachType::Ingress);
        let id = program.attach(cgroup, direction, mode).map_err(failed)?;
        FdLink::try_from(program.take_link(id).map_err(failed)?)
    } else if let Program::CgroupSockAddr(program) = program {
        let id = program.attach(cgroup, mode).map_err(failed)?;
        FdLink::try_from(program.take_link(id).map_err(failed)?)
    } else if let Program::CgroupSock(program) = program {
        let id = program.attach(cgroup, mode).map_err(failed)?;
        FdLink::try_from(program.take_link(id).map_err(failed)?)
    } else {
        let program = <&mut SockOps>::try_from(program).map_err(failed)?;
        let id = program.attach(cgroup, mode).map_err(failed)?;
        FdLink::try_from(program.take_link(id).map_err(failed)?)
    };
    let link = link.map_err(|_| LoadError::Missing("link after attaching"))?;
    link.pin(pin).map(drop).map_err(|error| LoadError::Pin(pin.to_path_buf(), error))
}

/// Adopts a pinned link. The program in it stays if it is the same code with the same facts, otherwise it is replaced in one step.
fn adopt(
    name: &'static str,
    program: &mut Program,
    link_pin: &Path,
    program_pin: &Path,
    cgroup_id: u64,
    cgroup: &Path,
    same_facts: bool,
) -> Result<(), LoadError> {
    let link = syscalls::obj_get(link_pin).map_err(at(link_pin))?;
    let info = syscalls::link_info(link.as_fd()).map_err(at(link_pin))?;
    if info.cgroup_id != cgroup_id {
        return Err(LoadError::OtherCgroup { path: link_pin.to_path_buf(), cgroup: cgroup.to_path_buf() });
    }
    let refused = |error| LoadError::Program(name, error);
    let tag = program.info().map_err(refused)?.tag();
    let pinned = ProgramInfo::from_pin(program_pin).ok();
    if same_facts && pinned.is_some_and(|pinned| pinned.id() == info.program_id && pinned.tag() == tag) {
        tracing::info!(program = name, link = info.id, "pinned link adopted");
        return Ok(());
    }
    let fd = program.fd().map_err(refused)?;
    syscalls::link_update(link.as_fd(), fd.as_fd()).map_err(at(link_pin))?;
    tracing::info!(program = name, link = info.id, "program replaced in its pinned link");
    replace_pin(program, program_pin)
}

/// Pins a program at a path where another program may be pinned.
pub(crate) fn replace_pin(program: &mut Program, pin: &Path) -> Result<(), LoadError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(pin)(error)),
        Ok(()) | Err(_) => {}
    }
    program.pin(pin).map_err(|error| LoadError::Pin(pin.to_path_buf(), error))
}
