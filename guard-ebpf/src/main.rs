//! Owns the kernel programs: `ingress` judges packets to listeners, `sockops` opens and closes pinholes, `connect` judges where a
//! process may go, `egress` remembers who opened a UDP conversation, `edge` drops strangers before the stack where a policy asks for it.
//! Called by the kernel, from the links that the daemon pins.
//! Must never decide by itself: the rule is `guard_common::decide`, and doubt denies.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod edge;
#[cfg(target_arch = "bpf")]
mod egress;
#[cfg(all(target_arch = "bpf", feature = "probe"))]
mod flood;
#[cfg(target_arch = "bpf")]
mod ingress;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(all(target_arch = "bpf", feature = "probe"))]
mod probe;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod socket;
#[cfg(target_arch = "bpf")]
mod sockops;
#[cfg(target_arch = "bpf")]
mod window;

/// A panic that could be reached is refused by the verifier ("last insn is not an exit or jmp"), so that none can be overlooked.
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
