//! Owns the edge tier's links: one on each interface that the policy names, made, adopted, mended and removed.
//! Called by `app` after every ruleset that came into force and every few seconds, and by `status`.
//! Must never fail the guard: what goes wrong here is told, and the guard behind judges every packet anyway.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::programs::{Program, SchedClassifier, Xdp};

use crate::kernel::{
    error::{LoadError, at},
    links::{
        edge_hooks::{EDGE_PROGRAMS, EdgeLink, Hook, HookLink, XDP},
        programs::{Programs, replace_pin, verifier_tail},
        upgrade::Predecessor,
    },
    pins::pins,
    syscalls,
    syscalls::LinkInfo,
};

/// `ARPHRD_ETHER` and `ARPHRD_LOOPBACK`: what carries Ethernet headers, which is what the programs read.
const ETHERNETS: [u16; 2] = [1, 772];

/// What became of the edge tier.
#[derive(Clone, Debug, Default)]
pub struct EdgeReport {
    /// Every interface that is named.
    pub links: Vec<EdgeLink>,
    /// What somebody else had removed or changed.
    pub mended: Vec<String>,
}

impl Programs {
    /// Takes over the links of builds of another ABI, so that there is no moment without one.
    pub fn take_edge(&mut self, predecessors: &[Predecessor], wanted: &BTreeSet<String>) {
        if wanted.is_empty() || predecessors.is_empty() {
            return;
        }
        let taken = self.load_edge().and_then(|()| {
            for (before, (hook, interface)) in predecessors
                .iter()
                .flat_map(|before| pinned(&before.links()).into_iter().map(move |link| (before, link)))
                .filter(|(_, (_, interface))| wanted.contains(interface))
            {
                let program = self.ebpf.program(hook.program()).ok_or(LoadError::Missing(hook.program()))?;
                let fd = program.fd().map_err(|error| LoadError::Program(hook.program(), error.to_string()))?;
                let pin = self.location.pins().join("links").join(pin_name(hook, &interface));
                before.hand_over_edge(fd.as_fd(), &pin)?;
            }
            Ok(())
        });
        if let Err(error) = taken {
            tracing::warn!(%error, "the edge tier of another ABI cannot be taken over: it is attached anew");
        }
    }

    /// Makes the edge tier be on exactly these interfaces, as far as they are there.
    pub fn hold_edge(&mut self, wanted: &BTreeSet<String>) -> EdgeReport {
        let links = self.location.pins().join("links");
        self.drop_unwanted(&links, wanted);
        if wanted.is_empty() {
            return EdgeReport::default();
        }
        let ready = self.load_edge().map_err(|error| error.to_string());
        let interfaces = interfaces().map_err(|error| format!("interfaces cannot be listed: {error}"));
        let mut tier = EdgeReport::default();
        for interface in wanted {
            let held = ready.clone().and_then(|()| {
                let known = interfaces.as_ref().map_err(Clone::clone)?.get(interface).copied();
                let Some((index, kind)) = known else {
                    self.forget(&links, interface);
                    return Err("the interface is not there: the tier waits for it".to_owned());
                };
                if !ETHERNETS.contains(&kind) {
                    return Err("not an Ethernet interface".to_owned());
                }
                self.hold_one(&links, interface, index, &mut tier.mended).map_err(|error| error.to_string())
            });
            let note = match &held {
                Ok(note) | Err(note) => note.clone(),
            };
            self.tell(interface, held.is_ok(), &note);
            let live = self.edge.links.get(interface).filter(|_| held.is_ok());
            tier.links.push(live.map_or_else(
                || EdgeLink { interface: interface.clone(), note: note.clone(), ..EdgeLink::default() },
                |link| describe(interface, link.hook, syscalls::link_info(link.fd.as_fd()).ok(), note.clone()),
            ));
        }
        tier
    }

    /// Makes the link of one interface hold, and what there is to say of it.
    fn hold_one(
        &mut self,
        links: &Path,
        interface: &str,
        index: u32,
        mended: &mut Vec<String>,
    ) -> Result<String, LoadError> {
        let known = self.edge.links.contains_key(interface);
        if !known {
            self.adopt_edge(links, interface)?;
        }
        let Some(link) = self.edge.links.get(interface) else { return self.attach_edge(links, interface, index) };
        let pin = links.join(pin_name(link.hook, interface));
        let info = syscalls::link_info(link.fd.as_fd()).map_err(at(&pin))?;
        if info.interface() != index {
            if known && link.index == index {
                mended.push(format!("link of the edge tier on {interface}"));
            }
            self.forget(links, interface);
            return self.attach_edge(links, interface, index);
        }
        let found = syscalls::obj_get(&pin).and_then(|found| syscalls::link_info(found.as_fd())).ok();
        if found.is_none_or(|found| found.id != info.id) {
            remove(&pin).map_err(at(&pin))?;
            syscalls::obj_pin(link.fd.as_fd(), &pin).map_err(at(&pin))?;
            mended.push(format!("pin of the edge tier on {interface}"));
        }
        let name = link.hook.program();
        if self.edge.programs.get(name) != Some(&info.program_id) {
            let program = self.ebpf.program(name).ok_or(LoadError::Missing(name))?;
            let fd = program.fd().map_err(|error| LoadError::Program(name, error.to_string()))?;
            syscalls::link_update(link.fd.as_fd(), fd.as_fd()).map_err(at(&pin))?;
            if known {
                mended.push(format!("program of the edge tier on {interface}"));
            }
        }
        let note = match link.hook {
            Hook::Xdp => String::new(),
            Hook::Tcx | Hook::XdpGeneric => self.edge.said.get(interface).cloned().unwrap_or_else(|| fallen(&[])),
        };
        if let Some(link) = self.edge.links.get_mut(interface) {
            link.index = index;
        }
        Ok(note)
    }

    /// Takes over the pinned link of an interface, if there is one.
    fn adopt_edge(&mut self, links: &Path, interface: &str) -> Result<(), LoadError> {
        for hook in Hook::ALL {
            let pin = links.join(pin_name(hook, interface));
            if !pin.exists() {
                continue;
            }
            let fd = syscalls::obj_get(&pin).map_err(at(&pin))?;
            let info = syscalls::link_info(fd.as_fd()).map_err(at(&pin))?;
            tracing::info!(interface, hook = hook.name(), link = info.id, "pinned link of the edge tier adopted");
            self.edge.links.insert(interface.to_owned(), HookLink { fd, hook, index: info.interface() });
            return Ok(());
        }
        Ok(())
    }

    /// Attaches to an interface by the first hook that takes the program, and pins the link.
    fn attach_edge(&mut self, links: &Path, interface: &str, index: u32) -> Result<String, LoadError> {
        let mut refused = Vec::new();
        for hook in Hook::ALL {
            let name = hook.program();
            let program = self.ebpf.program(name).ok_or(LoadError::Missing(name))?;
            let program = program.fd().map_err(|error| LoadError::Program(name, error.to_string()))?;
            let (attach_type, flags) = hook.attach_type();
            match syscalls::link_create(program.as_fd(), index, attach_type, flags) {
                Ok(fd) => {
                    let pin = links.join(pin_name(hook, interface));
                    syscalls::obj_pin(fd.as_fd(), &pin).map_err(at(&pin))?;
                    self.edge.links.insert(interface.to_owned(), HookLink { fd, hook, index });
                    let note = if hook == Hook::Xdp { String::new() } else { fallen(&refused) };
                    // An older note is of an older link.
                    self.edge.said.remove(interface);
                    tracing::info!(interface, hook = hook.name(), "edge tier attached and pinned");
                    return Ok(note);
                }
                Err(error) => refused.push(format!("{}: {error}", hook.name())),
            }
        }
        Err(LoadError::Program("guard_edge", format!("cannot attach to {interface} ({})", refused.join(", "))))
    }

    /// Loads the programs of the edge tier: only where a policy asks for it.
    fn load_edge(&mut self) -> Result<(), LoadError> {
        let directory = self.location.pins().join("programs");
        for name in EDGE_PROGRAMS {
            if self.edge.programs.contains_key(name) {
                continue;
            }
            let refused = |error| LoadError::Program(name, verifier_tail(&error));
            let program = self.ebpf.program_mut(name).ok_or(LoadError::Missing(name))?;
            if program.fd().is_err() {
                if name == XDP {
                    <&mut Xdp>::try_from(&mut *program).map_err(refused)?.load().map_err(refused)?;
                } else {
                    <&mut SchedClassifier>::try_from(&mut *program).map_err(refused)?.load().map_err(refused)?;
                }
            }
            replace_pin(program, &directory.join(name))?;
            let id = Program::info(program).map_err(refused)?.id();
            self.edge.programs.insert(name, id);
        }
        Ok(())
    }

    fn drop_unwanted(&mut self, links: &Path, wanted: &BTreeSet<String>) {
        let held: Vec<String> = self.edge.links.keys().cloned().collect();
        let pinned = pinned(links).into_iter().map(|(_, interface)| interface);
        for interface in held.into_iter().chain(pinned).filter(|interface| !wanted.contains(interface)) {
            if self.forget(links, &interface) {
                tracing::info!(interface, "edge tier removed: the policy names this interface no more");
            }
        }
        self.edge.said.retain(|interface, _| wanted.contains(interface));
    }

    /// Detaches: the last descriptor of a link and its pin are its life. Whether there was anything.
    fn forget(&mut self, links: &Path, interface: &str) -> bool {
        let held = self.edge.links.remove(interface).is_some();
        let removed = Hook::ALL.map(|hook| remove(&links.join(pin_name(hook, interface))).unwrap_or(false));
        held || removed.contains(&true)
    }

    /// Logs what is new of an interface.
    fn tell(&mut self, interface: &str, holds: bool, note: &str) {
        if note.is_empty() {
            self.edge.said.remove(interface);
        } else if self.edge.said.insert(interface.to_owned(), note.to_owned()).as_deref() != Some(note) {
            match holds {
                true => tracing::warn!(interface, note, "edge tier, by the next best way"),
                false => tracing::error!(
                    interface,
                    note,
                    "the edge tier is not on this interface; the guard behind it judges every packet"
                ),
            }
        }
    }
}

/// The links of the edge tier that are pinned: the daemon need not run.
pub fn links(bpffs: &Path) -> Vec<EdgeLink> {
    let links = pins(bpffs).join("links");
    let live = |pin: PathBuf| syscalls::obj_get(&pin).and_then(|link| syscalls::link_info(link.as_fd())).ok();
    let of = |(hook, interface): (Hook, String)| {
        let info = live(links.join(pin_name(hook, &interface)));
        describe(&interface, hook, info, String::new())
    };
    pinned(&links).into_iter().map(of).collect()
}

fn describe(interface: &str, hook: Hook, info: Option<LinkInfo>, note: String) -> EdgeLink {
    EdgeLink {
        interface: interface.to_owned(),
        hook: hook.name().to_owned(),
        attached: info.is_some_and(|info| info.interface() != 0),
        link_id: info.map(|info| info.id),
        program_id: info.map(|info| info.program_id),
        note,
    }
}

/// Why a link is not attached by the best way.
fn fallen(refused: &[String]) -> String {
    if refused.is_empty() { "xdp: refused when this was attached".to_owned() } else { refused.join(", ") }
}

/// The interfaces of this network namespace: index and hardware type by name.
fn interfaces() -> io::Result<BTreeMap<String, (u32, u16)>> {
    let of = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let link = address.as_link_addr()?;
        Some((interface.interface_name, (u32::try_from(link.ifindex()).ok()?, link.hatype())))
    };
    Ok(nix::ifaddrs::getifaddrs()?.filter_map(of).collect())
}

/// `edge_HOOK_INTERFACE`. A name on bpffs takes no dots, so that what is neither letter nor digit is written by its number.
fn pin_name(hook: Hook, interface: &str) -> String {
    let mut name = format!("edge_{}_", hook.name());
    for byte in interface.bytes() {
        if byte.is_ascii_alphanumeric() { name.push(char::from(byte)) } else { name.push_str(&format!("%{byte:02x}")) }
    }
    name
}

/// What a pin's name says; `None` for every other pin.
fn read_name(name: &str) -> Option<(Hook, String)> {
    let (hook, escaped) = name.strip_prefix("edge_")?.split_once('_')?;
    let hook = Hook::ALL.into_iter().find(|known| known.name() == hook)?;
    let mut parts = escaped.split('%');
    let mut interface = parts.next()?.to_owned();
    for part in parts {
        let (byte, rest) = part.split_at_checked(2)?;
        interface.push(char::from(u8::from_str_radix(byte, 16).ok()?));
        interface.push_str(rest);
    }
    Some((hook, interface))
}

/// The edge tier's pins in a directory of links.
fn pinned(links: &Path) -> Vec<(Hook, String)> {
    let names =
        fs::read_dir(links).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| read_name(&name)).collect()
}

/// Removes a file; `false` where there was none.
fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_pins_name_says_the_interface_and_has_no_dot(interface in "[!-.0-9;-~]{1,15}", hook in 0usize..3) {
            let hook = Hook::ALL[hook];
            let name = pin_name(hook, &interface);
            prop_assert!(!name.contains(['.', '/']));
            prop_assert_eq!(read_name(&name), Some((hook, interface)));
        }
    }

    #[test]
    fn other_pins_are_none_of_the_edges() {
        for name in ["guard_ingress", "edge_", "edge_xdp", "edge_other_eth0", "edge_xdp_eth0%2", "edge_xdp_%zz"] {
            assert_eq!(read_name(name), None, "{name}");
        }
    }
}
