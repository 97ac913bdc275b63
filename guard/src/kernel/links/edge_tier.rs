//! Owns the links of the edge tier, one on each interface that the policy names: attaching, adopting, mending and removing them.
//! Called by `daemon/hold` every few seconds, by `daemon/edit` after every ruleset that came into force, by `daemon/run` and by `report`.
//! Must never stop the guard: a failure here is reported, and the guard behind the edge tier judges every packet anyway.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fmt, fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::programs::{Program, SchedClassifier, Xdp};

use crate::{
    kernel::{
        error::{LoadError, LoadRefusal, at},
        links::{
            edge_hooks::{EDGE_PROGRAMS, EdgeLink, Hook, HookLink, XDP},
            programs::{Programs, replace_pin},
            upgrade::Predecessor,
        },
        pins::pins,
        syscalls,
        syscalls::LinkInfo,
    },
    sys::error_chain::with_causes,
};

/// `ARPHRD_ETHER` and `ARPHRD_LOOPBACK`: the interfaces with Ethernet headers, which the programs read.
const ETHERNETS: [u16; 2] = [1, 772];

/// The state of the edge tier after it was checked.
#[derive(Clone, Debug, Default)]
pub struct EdgeReport {
    /// Every interface that the policy names.
    pub links: Vec<EdgeLink>,
    /// What someone else had removed or changed, and was restored.
    pub mended: Vec<String>,
}

impl Programs {
    /// Takes over the links of builds of another ABI, so that the edge tier is never detached.
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
                let fd = program.fd().map_err(|error| LoadError::Program(hook.program(), error))?;
                let pin = self.location.pins().join("links").join(pin_name(hook, &interface));
                before.hand_over_edge(fd.as_fd(), &pin)?;
            }
            Ok(())
        });
        if let Err(error) = taken {
            let error = with_causes(error.to_string(), error.source());
            tracing::warn!(error, "cannot take over the edge tier of another ABI; attaching it again");
        }
    }

    /// Attaches the edge tier to these interfaces, as far as they exist, and removes it from all others.
    pub fn hold_edge(&mut self, wanted: &BTreeSet<String>) -> EdgeReport {
        let links = self.location.pins().join("links");
        self.drop_unwanted(&links, wanted);
        if wanted.is_empty() {
            return EdgeReport::default();
        }
        let interfaces = self.load_edge().map_err(EdgeError::from).and_then(|()| interfaces());
        let mut report = EdgeReport::default();
        for interface in wanted {
            let failed = |error: &EdgeError| (false, with_causes(error.to_string(), error.source()));
            let (attached, note) = match &interfaces {
                Ok(known) => match self.hold_named(&links, known, interface, &mut report.mended) {
                    Ok(note) => (true, note),
                    Err(error) => failed(&error),
                },
                Err(error) => failed(error),
            };
            self.log_new_note(interface, attached, &note);
            let live = self.edge.links.get(interface).filter(|_| attached);
            report.links.push(live.map_or_else(
                || EdgeLink { interface: interface.clone(), note: note.clone(), ..EdgeLink::default() },
                |link| describe(interface, link.hook, syscalls::link_info(link.fd.as_fd()).ok(), note.clone()),
            ));
        }
        report
    }

    /// Attaches the edge tier to a named interface if it exists and is an Ethernet interface.
    fn hold_named(
        &mut self,
        links: &Path,
        known: &Interfaces,
        interface: &str,
        mended: &mut Vec<String>,
    ) -> Result<String, EdgeError> {
        let Some((index, kind)) = known.get(interface).copied() else {
            self.forget(links, interface);
            return Err(EdgeError::NoInterface);
        };
        if !ETHERNETS.contains(&kind) {
            return Err(EdgeError::NotEthernet);
        }
        self.hold_one(links, interface, index, mended)
    }

    /// Attaches the edge tier to an interface, or checks and mends its link. Returns why the link uses a fallback hook, if it does.
    fn hold_one(
        &mut self,
        links: &Path,
        interface: &str,
        index: u32,
        mended: &mut Vec<String>,
    ) -> Result<String, EdgeError> {
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
            let fd = program.fd().map_err(|error| LoadError::Program(name, error))?;
            syscalls::link_update(link.fd.as_fd(), fd.as_fd()).map_err(at(&pin))?;
            if known {
                mended.push(format!("program of the edge tier on {interface}"));
            }
        }
        let note = match link.hook {
            Hook::Xdp => String::new(),
            Hook::Tcx | Hook::XdpGeneric => self
                .edge
                .said
                .get(interface)
                .cloned()
                .unwrap_or_else(|| "xdp: refused when the link was attached".to_owned()),
        };
        if let Some(link) = self.edge.links.get_mut(interface) {
            link.index = index;
        }
        Ok(note)
    }

    /// Adopts the pinned link of an interface, if there is one.
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

    /// Attaches the edge tier to an interface with the first hook that accepts the program, and pins the link.
    fn attach_edge(&mut self, links: &Path, interface: &str, index: u32) -> Result<String, EdgeError> {
        let mut refusals = HookRefusals(Vec::new());
        for hook in Hook::ALL {
            let name = hook.program();
            let program = self.ebpf.program(name).ok_or(LoadError::Missing(name))?;
            let program = program.fd().map_err(|error| LoadError::Program(name, error))?;
            let (attach_type, flags) = hook.attach_type();
            match syscalls::link_create(program.as_fd(), index, attach_type, flags) {
                Ok(fd) => {
                    let pin = links.join(pin_name(hook, interface));
                    syscalls::obj_pin(fd.as_fd(), &pin).map_err(at(&pin))?;
                    self.edge.links.insert(interface.to_owned(), HookLink { fd, hook, index });
                    let note = refusals.to_string();
                    // An older note is about an older link.
                    self.edge.said.remove(interface);
                    tracing::info!(interface, hook = hook.name(), "edge tier attached and pinned");
                    return Ok(note);
                }
                Err(error) => refusals.0.push((hook, error)),
            }
        }
        Err(EdgeError::NoHook(refusals))
    }

    /// Loads the programs of the edge tier. This happens only if a policy names interfaces.
    fn load_edge(&mut self) -> Result<(), LoadError> {
        let directory = self.location.pins().join("programs");
        for name in EDGE_PROGRAMS {
            if self.edge.programs.contains_key(name) {
                continue;
            }
            let refused = |error| LoadError::Load(name, LoadRefusal(error));
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
                tracing::info!(interface, "edge tier removed: the policy no longer names this interface");
            }
        }
        self.edge.said.retain(|interface, _| wanted.contains(interface));
    }

    /// Detaches the edge tier by closing the link and removing its pin. Returns whether there was a link or a pin.
    fn forget(&mut self, links: &Path, interface: &str) -> bool {
        let held = self.edge.links.remove(interface).is_some();
        let removed = Hook::ALL.map(|hook| remove(&links.join(pin_name(hook, interface))).unwrap_or(false));
        held || removed.contains(&true)
    }

    /// Logs the note of an interface if it is new.
    fn log_new_note(&mut self, interface: &str, attached: bool, note: &str) {
        if note.is_empty() {
            self.edge.said.remove(interface);
        } else if self.edge.said.insert(interface.to_owned(), note.to_owned()).as_deref() != Some(note) {
            match attached {
                true => tracing::warn!(interface, note, "edge tier attached with a fallback hook"),
                false => tracing::error!(
                    interface,
                    note,
                    "the edge tier is not attached to this interface; the guard behind it judges every packet"
                ),
            }
        }
    }
}

/// The pinned links of the edge tier. This does not need a running daemon.
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

/// Why the edge tier is not attached to an interface.
#[derive(Debug, thiserror::Error)]
enum EdgeError {
    #[error("the interface does not exist; the edge tier is attached when it appears")]
    NoInterface,
    #[error("not an Ethernet interface")]
    NotEthernet,
    #[error("cannot list the network interfaces")]
    Interfaces(#[source] io::Error),
    #[error("no hook accepts the program ({0})")]
    NoHook(HookRefusals),
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// The hooks that did not accept the program, each with the kernel's error.
#[derive(Debug)]
struct HookRefusals(Vec<(Hook, io::Error)>);

impl fmt::Display for HookRefusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (hook, error)) in self.0.iter().enumerate() {
            write!(f, "{}{}: {error}", if index == 0 { "" } else { ", " }, hook.name())?;
        }
        Ok(())
    }
}

/// The interfaces of a network namespace: index and hardware type by name.
type Interfaces = BTreeMap<String, (u32, u16)>;

/// Lists the interfaces of this network namespace.
fn interfaces() -> Result<Interfaces, EdgeError> {
    let of = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let link = address.as_link_addr()?;
        Some((interface.interface_name, (u32::try_from(link.ifindex()).ok()?, link.hatype())))
    };
    let addresses = nix::ifaddrs::getifaddrs().map_err(|error| EdgeError::Interfaces(error.into()))?;
    Ok(addresses.filter_map(of).collect())
}

/// The name of a pin: `edge_HOOK_INTERFACE`. bpffs does not allow dots, so every byte except letters and digits is written as `%` and two hex
/// digits.
fn pin_name(hook: Hook, interface: &str) -> String {
    let mut name = format!("edge_{}_", hook.name());
    for byte in interface.bytes() {
        if byte.is_ascii_alphanumeric() { name.push(char::from(byte)) } else { name.push_str(&format!("%{byte:02x}")) }
    }
    name
}

/// The hook and the interface in the name of a pin; `None` for a pin of another kind.
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

/// The pins of the edge tier in a directory of links.
fn pinned(links: &Path) -> Vec<(Hook, String)> {
    let names =
        fs::read_dir(links).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| read_name(&name)).collect()
}

/// Removes a file. Returns whether it existed.
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
