//! Puts the kernel object into the daemon, and refuses a missing or an old one.

use std::{env, error::Error, fs, path::Path};

#[path = "../xtask/src/stamp.rs"]
mod stamp;

fn main() -> Result<(), Box<dyn Error>> {
    let manifest = env::var("CARGO_MANIFEST_DIR")?;
    let root = Path::new(&manifest).parent().ok_or("the package stands in a workspace")?;
    let output = root.join(stamp::OUTPUT);
    // Program diagnostics cost instructions: they are in an object of their own, for daemons built to show them.
    let feature = |name: &str| env::var_os(format!("CARGO_FEATURE_{name}")).is_some();
    let name = match (feature("OTHER_ABI"), feature("EBPF_LOG")) {
        (true, _) => "guard-other.o",
        (false, true) => "guard-log.o",
        (false, false) => "guard.o",
    };
    let (object, written) = (output.join(name), output.join(stamp::STAMP));
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rerun-if-changed={}", written.display());
    for source in stamp::SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    let found = fs::read_to_string(&written).unwrap_or_default();
    if !object.is_file() || found.is_empty() {
        println!("cargo::error=the kernel object {} is missing: run `cargo xtask build-ebpf`", object.display());
    } else if found.trim() != stamp::of(root)? {
        println!(
            "cargo::error=the kernel object {} is older than its sources: run `cargo xtask build-ebpf`",
            object.display()
        );
    }
    println!("cargo::rustc-env=NODEGUARD_BPF_OBJECT={}", object.display());
    Ok(())
}
