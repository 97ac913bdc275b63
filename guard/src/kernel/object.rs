//! Owns the kernel object that is built into this binary.
//! Called by `load`.
//! Must never be an old one: the build script refuses a missing or stale object.

/// The ELF object, as `cargo xtask build-ebpf` made it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("NODEGUARD_BPF_OBJECT"));

/// The programs, by name: what has to be attached for the guard to hold. Attached in this order: pinholes must work before
/// anything is denied.
pub const PROGRAMS: [&str; 7] =
    ["guard_connect4", "guard_connect6", "guard_sendmsg4", "guard_sendmsg6", "guard_egress", "guard_sockops", JUDGES];
/// The program that denies: the last one to be attached.
pub const JUDGES: &str = "guard_ingress";
