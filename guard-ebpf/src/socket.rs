//! Owns what the programs learn about a socket or a process: port, protocol, network namespace, the cgroups around it.
//! Called by the hooks, and by the judgements of guard-common through `PacketSocket` and `Ancestors`.
//! Must never judge: these are facts, and a fact that the kernel cannot give is replaced by the one that admits less.

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    cty::c_void,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_fullsock,
        bpf_sk_storage_get, bpf_skb_ancestor_cgroup_id,
    },
    programs::SkBuffContext,
};
use guard_common::{
    Ancestors, Namespace, PacketSocket,
    abi::Spoken,
    packet::{TCP, UDP},
};

use crate::maps::{self, EARLIER_SOCKETS, NAMESPACE_OF, SPOKEN};

/// States of the kernel's `tcp_states.h`: a listener, an unfinished handshake, and the state of every unconnected UDP socket.
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;
const TCP_CLOSE: u32 = 7;
/// The type of a datagram socket, from the kernel's `net.h`. A raw socket that writes UDP headers has another.
const SOCK_DGRAM: u32 = 2;

/// The port and protocol of a socket that anybody may send to: a TCP listener or an unconnected UDP socket. `None` for any other socket.
#[inline(always)]
pub(crate) fn listening(ctx: &SkBuffContext) -> Option<(u16, u8)> {
    // SAFETY: the verifier gives `sk` as a socket or null, and both fields are in the part that every socket has.
    let (sk, state, port) = unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        (sk, (*sk).state, (*sk).src_port as u16)
    };
    match state {
        // SCTP and DCCP have listeners in the same state.
        TCP_LISTEN if is_tcp(sk) => Some((port, TCP)),
        TCP_NEW_SYN_RECV => Some((port, TCP)),
        TCP_CLOSE if is_udp(sk) => Some((port, UDP)),
        _ => None,
    }
}

#[inline(always)]
fn is_tcp(sk: *mut bpf_sock) -> bool {
    // SAFETY: the argument is a socket that is not null; the result is checked before it is read.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        !full.is_null() && (*full).protocol == TCP as u32
    }
}

#[inline(always)]
fn is_udp(sk: *mut bpf_sock) -> bool {
    // SAFETY: the argument is a socket that is not null; the result is checked before it is read.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        !full.is_null() && (*full).protocol == UDP as u32 && (*full).type_ == SOCK_DGRAM
    }
}

/// A map as the kernel's helpers take it.
#[inline(always)]
fn map_of<T>(map: &'static SkStorage<T>) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

/// The memory of the packet's socket of who spoke first to it. `None` if there is no room for it.
#[inline(always)]
pub(crate) fn spoken(ctx: &SkBuffContext) -> Option<&'static mut Spoken> {
    // SAFETY: the socket is checked before it is given to the helper; the kernel frees its storage after a grace period. A lost race of two
    // writes of one byte costs a note of the same second.
    unsafe {
        let sk = full_socket(ctx)?;
        let storage = bpf_sk_storage_get(
            map_of(&SPOKEN),
            sk.cast(),
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        );
        storage.cast::<Spoken>().as_mut()
    }
}

#[inline(always)]
fn full_socket(ctx: &SkBuffContext) -> Option<*mut bpf_sock> {
    // SAFETY: the verifier gives `sk` as a socket or null; the result is checked.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        let full = bpf_sk_fullsock(sk);
        if full.is_null() { None } else { Some(full) }
    }
}

/// Notes the network namespace of a socket that begins to listen or to send. `sk` must be the full socket of the program's context.
#[inline(always)]
pub(crate) fn note_namespace(sk: *mut bpf_sock, mut netns: u64) {
    if sk.is_null() {
        return;
    }
    // SAFETY: the socket is not null; the helper copies the value. A note that does not fit leaves the namespace unknown: doubt denies.
    unsafe {
        bpf_sk_storage_get(
            map_of(&NAMESPACE_OF),
            sk.cast(),
            (&raw mut netns).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        );
    }
}

/// The network namespace of the packet's socket, as it was noted; 0 if it was not.
#[inline(always)]
fn noted_namespace(ctx: &SkBuffContext) -> u64 {
    let Some(sk) = full_socket(ctx) else { return 0 };
    // SAFETY: the socket is not null; the result is checked before it is read.
    unsafe {
        let noted = bpf_sk_storage_get(map_of(&NAMESPACE_OF), sk.cast(), core::ptr::null_mut(), 0).cast::<u64>();
        if !noted.is_null() {
            return *noted;
        }
        let cookie = bpf_get_socket_cookie(ctx.skb.skb.cast());
        EARLIER_SOCKETS.get(cookie).copied().unwrap_or(0)
    }
}

/// The socket that a packet is for, or that sends it.
pub(crate) struct SkbSocket<'a> {
    pub(crate) ctx: &'a SkBuffContext,
}

impl Ancestors for SkbSocket<'_> {
    #[inline(always)]
    fn cgroup_at(&self, level: u32) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_skb_ancestor_cgroup_id(self.ctx.skb.skb, level as i32) }
    }
}

impl PacketSocket for SkbSocket<'_> {
    #[inline(always)]
    fn namespace(&self) -> (Namespace, u64) {
        let netns = if maps::has_netns_helper() {
            // SAFETY: the helper takes the program's own context (cgroup_skb since 6.15).
            unsafe { bpf_get_netns_cookie(self.ctx.skb.skb.cast()) }
        } else {
            noted_namespace(self.ctx)
        };
        let namespace = match netns {
            0 => Namespace::Unknown,
            netns if netns == maps::node_netns() => Namespace::Node,
            _ => Namespace::Pod,
        };
        (namespace, netns)
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_socket_cookie(self.ctx.skb.skb.cast()) }
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: a plain field of the program's own context.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    #[inline(always)]
    fn is_udp(&self) -> bool {
        // SAFETY: the verifier gives `sk` as a socket or null.
        let sk = unsafe { (*self.ctx.skb.skb).__bindgen_anon_2.sk };
        !sk.is_null() && is_udp(sk)
    }
}

/// The process that runs the hook.
pub(crate) struct CurrentProcess;

impl Ancestors for CurrentProcess {
    #[inline(always)]
    fn cgroup_at(&self, level: u32) -> u64 {
        // SAFETY: the helper takes a number.
        unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
    }
}
