//! Owns the kernel object that is built into this binary.
//! Called by `programs` and `map_definition`.
//! Must never be outdated: the build script refuses a missing or stale object.

/// The ELF object, as `cargo xtask build-ebpf` made it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("NODEGUARD_BPF_OBJECT"));

/// The names of the programs that must be attached, in the order in which they are attached: pinholes must work before anything is denied.
pub const PROGRAMS: [&str; 10] = [
    "guard_bind4",
    "guard_bind6",
    "guard_connect4",
    "guard_connect6",
    "guard_sendmsg4",
    "guard_sendmsg6",
    "guard_egress",
    "guard_sockops",
    JUDGES[0],
    JUDGES[1],
];
/// The programs that deny packets. Each denies without the other, and they are attached last.
pub const JUDGES: [&str; 2] = ["guard_ingress", "guard_ingress_too"];
