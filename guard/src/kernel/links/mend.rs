//! Owns restoring pins and links that someone removes or replaces while the daemon runs.
//! Called by `daemon/hold`, every few seconds.
//! Must never restore silently: until then the node was open or could have been.

use std::{fs, io, os::fd::AsFd, path::Path};

use aya::{maps::MapInfo, programs::ProgramInfo};

use crate::kernel::{
    error::LoadError,
    links::{
        object::PROGRAMS,
        programs::{CgroupLink, Programs, attachments},
    },
    syscalls,
};

impl Programs {
    /// Whether every link is attached and has the program that this daemon put into it.
    pub fn all_attached(&self) -> bool {
        self.links.iter().all(|link| {
            syscalls::link_info(link.fd.as_fd())
                .is_ok_and(|info| info.cgroup_id != 0 && info.program_id == link.program_id)
        })
    }

    /// Restores missing pins and attaches detached or replaced programs again. Returns the names of what was restored.
    pub fn mend(&mut self) -> Result<Vec<String>, LoadError> {
        let pins = self.location.pins();
        for kind in ["maps", "programs", "links"] {
            let directory = pins.join(kind);
            fs::create_dir_all(&directory).map_err(|error| LoadError::Path(directory, error))?;
        }
        let mut mended = Vec::new();
        for (name, map) in &self.pinned {
            let path = pins.join("maps").join(name);
            let found = MapInfo::from_pin(&path).map(|info| info.id()).ok();
            if found != Some(map.info()?.id()) {
                make_way(&path)?;
                map.pin(&path).map_err(|error| LoadError::Pin(path, error))?;
                mended.push(format!("pin of the map {name}"));
            }
        }
        for CgroupLink { name, fd: link, .. } in &self.links {
            let path = pins.join("links").join(name);
            let of = |error| LoadError::Path(path.clone(), error);
            let held = syscalls::link_info(link.as_fd()).map_err(of)?;
            let found = syscalls::obj_get(&path).and_then(|link| syscalls::link_info(link.as_fd())).ok();
            // A detached link is replaced below.
            if held.cgroup_id != 0 && found.is_none_or(|found| found.id != held.id) {
                make_way(&path)?;
                syscalls::obj_pin(link.as_fd(), &path).map_err(|error| LoadError::Path(path, error))?;
                mended.push(format!("pin of the link of the program {name}"));
            }
        }
        let before = mended.len();
        for (name, attachment) in PROGRAMS.into_iter().zip(attachments(&self.location.bpffs)) {
            let pinned = ProgramInfo::from_pin(pins.join("programs").join(name)).map(|program| program.id()).ok();
            if attachment.attached && attachment.program_id == pinned {
                continue;
            }
            if !attachment.attached {
                // A detached link can never be attached again, so its pin is removed for a new link.
                make_way(&pins.join("links").join(name))?;
            }
            mended.push(format!("link of the program {name}"));
        }
        if mended.len() > before {
            self.attach()?;
        }
        Ok(mended)
    }
}

fn make_way(path: &Path) -> Result<(), LoadError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LoadError::Path(path.to_path_buf(), error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
