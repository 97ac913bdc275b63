//! Owns the stamp of the kernel object: one number over all its sources.
//! Called by `build_ebpf`, which writes it, and by the build script of guard, which includes this file and compares the stamp.
//! Must never use anything outside std: the build script has no dependencies.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The sources of the kernel object, below the workspace root.
pub(crate) const SOURCES: [&str; 5] =
    ["guard-ebpf", "guard-common", "Cargo.toml", ".cargo/config.toml", "xtask/src/build_ebpf.rs"];

/// The directory of the objects and their stamp, below the workspace root.
pub(crate) const OUTPUT: &str = "target/bpf";

/// The name of the stamp beside the objects.
pub(crate) const STAMP: &str = "guard.stamp";

/// Every source file, sorted.
pub(crate) fn files(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    Ok(files)
}

/// The stamp: FNV-1a (64 bits) over the names and bytes of the sources. It finds edits, not attackers.
pub(crate) fn of(root: &Path) -> io::Result<String> {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        hash = (hash ^ 0xff).wrapping_mul(0x0100_0000_01b3);
    };
    for file in files(root)? {
        add(file.strip_prefix(root).unwrap_or(&file).as_os_str().as_encoded_bytes());
        add(&fs::read(&file)?);
    }
    Ok(format!("{hash:016x}"))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if path.is_file() {
        files.push(path.to_path_buf());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
