//! Owns the kernel programs, one file a hook: `ingress` judges packets to listeners, `egress` remembers what UDP sockets ask and send,
//! `connect` judges where a process may go, `sockops` opens and closes pinholes, `bind` notes whose a UDP socket is, `edge` drops strangers
//! before the network stack.
//! Called by the kernel, from the links that the daemon pins.
//! Must never decide by itself: the rules are the judgements of guard-common, and doubt denies.
//!
//! Below the hooks, each importing only from those before it: `clock`, `maps`, `report`, `socket`, `flows`; `bytes` and `socket` give the
//! judgements a packet and its socket.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(all(target_arch = "bpf", feature = "probe"))]
mod bench;
#[cfg(target_arch = "bpf")]
mod bind;
#[cfg(target_arch = "bpf")]
mod bytes;
#[cfg(target_arch = "bpf")]
mod clock;
#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod edge;
#[cfg(target_arch = "bpf")]
mod egress;
#[cfg(target_arch = "bpf")]
mod flows;
#[cfg(target_arch = "bpf")]
mod ingress;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod socket;
#[cfg(target_arch = "bpf")]
mod sockops;

/// The verifier rejects a reachable panic ("last insn is not an exit or jmp"), so that none can be overlooked.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The host build of this crate exists so that the whole workspace can be checked; it does nothing.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
