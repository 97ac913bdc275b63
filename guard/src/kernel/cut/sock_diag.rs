//! Owns listing and ending TCP sockets with sock_diag(7), in the network namespace of the calling thread.
//! Called by `established`, and by `dial/kubelet` to find listeners.
//! Must never end a socket by its addresses alone: the cookie identifies the socket that was judged.

use std::{collections::BTreeSet, io, net::SocketAddr};

use guard_common::Reason;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla as _,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, SOCK_DESTROY, TCP_LISTEN},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

/// `INET_DIAG_CGROUP_ID` of the kernel's `inet_diag.h` (5.9): the cgroup v2 id, a native u64.
const CGROUP_ID: u16 = 21;
/// `INET_DIAG_NOCOOKIE` of the kernel's `inet_diag.h`: any socket.
const ANY_COOKIE: [u8; 8] = [0xff; 8];

/// A TCP socket, IPv4 addresses in IPv4 form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// The local address.
    pub local: SocketAddr,
    /// The peer's address.
    pub remote: SocketAddr,
    /// The inode; 0 if no process has the socket open.
    pub inode: u32,
    /// The id of the cgroup, if the kernel reports it.
    pub cgroup: Option<u64>,
    state: u8,
    family: u8,
    id: SocketId,
}

impl TcpSocket {
    /// The cookie, in the byte order of sock_diag.
    pub(crate) fn cookie(&self) -> [u8; 8] {
        self.id.cookie
    }

    /// Whether the socket is a listener.
    pub fn listens(&self) -> bool {
        self.state == TCP_LISTEN
    }
}

/// The cookies of the sockets that listen on a TCP port, in this thread's network namespace.
pub(crate) fn listeners(port: u16) -> io::Result<BTreeSet<u64>> {
    let diag = SockDiag::open()?;
    let mut cookies = BTreeSet::new();
    for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let id = SocketId { source_port: port, ..id };
        diag.send((family, IPPROTO_TCP), id, StateFlags::LISTEN, NLM_F_REQUEST | NLM_F_DUMP, None)?;
        let mut take = |response: InetResponse| {
            let id = response.header.socket_id;
            if id.source_port == port {
                cookies.insert(u64::from_ne_bytes(id.cookie));
            }
        };
        diag.receive(&mut take)?;
    }
    Ok(cookies)
}

/// The cookies of the sockets that anybody may send to, TCP listeners and unconnected UDP sockets, in this thread's network namespace, and
/// whether these are all: a kernel can be without udp_diag.
pub(crate) fn receivers() -> io::Result<(BTreeSet<u64>, bool)> {
    let diag = SockDiag::open()?;
    let (mut cookies, mut complete) = (BTreeSet::new(), true);
    for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        for (protocol, states) in [(IPPROTO_TCP, StateFlags::LISTEN), (IPPROTO_UDP, StateFlags::CLOSE)] {
            diag.send((family, protocol), id.clone(), states, NLM_F_REQUEST | NLM_F_DUMP, None)?;
            let received = diag.receive(|response| {
                cookies.insert(u64::from_ne_bytes(response.header.socket_id.cookie));
            });
            match received {
                Err(error) if protocol == IPPROTO_UDP && error.raw_os_error() == Some(libc::ENOENT) => complete = false,
                other => other?,
            }
        }
    }
    Ok((cookies, complete))
}

/// Whether a connection with exactly these two ends is in this thread's network namespace, be it still in its handshake. A listener alone is
/// none.
pub(crate) fn has_connection(local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    let diag = SockDiag::open()?;
    let interface_id = match remote {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(remote) => remote.scope_id(),
    };
    let id = SocketId {
        source_address: local.ip(),
        source_port: local.port(),
        destination_address: remote.ip(),
        destination_port: remote.port(),
        interface_id,
        cookie: ANY_COOKIE,
    };
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    // The kernel's look-up falls back to a listener, which has no such remote end.
    let ends = |at: SocketAddr| (at.ip(), at.port());
    let mut found = false;
    diag.send((family, IPPROTO_TCP), id, StateFlags::all(), NLM_F_REQUEST | NLM_F_ACK, None)?;
    let received = diag.receive(|response| {
        let socket = socket(&response);
        found |= (ends(socket.local), ends(socket.remote)) == (ends(local), ends(remote));
    });
    match received {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        other => other.map(|()| found),
    }
}

/// A netlink socket for sock_diag.
pub(crate) struct SockDiag(Socket);

impl SockDiag {
    /// Every TCP socket of this thread's network namespace, except those in TIME_WAIT.
    pub(crate) fn dump() -> io::Result<Vec<TcpSocket>> {
        let diag = SockDiag::open()?;
        let mut sockets = Vec::new();
        for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            diag.send(
                (family, IPPROTO_TCP),
                id,
                StateFlags::all() - StateFlags::TIME_WAIT,
                NLM_F_REQUEST | NLM_F_DUMP,
                None,
            )?;
            diag.receive(|response| sockets.push(socket(&response)))?;
        }
        Ok(sockets)
    }

    /// Ends sockets with a RST (`SOCK_DESTROY`, Linux 4.5 with CONFIG_INET_DIAG_DESTROY). A socket that no longer exists counts as ended.
    pub(crate) fn destroy(sockets: &[(TcpSocket, Reason)]) -> io::Result<Vec<bool>> {
        let diag = SockDiag::open()?;
        let mut done = Vec::new();
        for (TcpSocket { family, id, local, .. }, _) in sockets {
            diag.send(
                (*family, IPPROTO_TCP),
                id.clone(),
                StateFlags::all(),
                NLM_F_REQUEST | NLM_F_ACK,
                Some(SOCK_DESTROY),
            )?;
            done.push(match diag.receive(drop) {
                Ok(()) => true,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) => {
                    tracing::error!(%error, %local, "cannot end a connection (SOCK_DESTROY)");
                    false
                }
            });
        }
        Ok(done)
    }

    fn open() -> io::Result<SockDiag> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        Ok(SockDiag(socket))
    }

    fn send(
        &self,
        (family, protocol): (u8, u8),
        socket_id: SocketId,
        states: StateFlags,
        flags: u16,
        kind: Option<u16>,
    ) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let request = InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id };
        let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        message.finalize();
        if let Some(kind) = kind {
            message.header.message_type = kind;
        }
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0).map(drop)
    }

    /// Reads answers until the last one.
    fn receive(&self, mut take: impl FnMut(InetResponse)) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(64 << 10);
        loop {
            buffer.clear();
            self.0.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
                // Messages are aligned to four bytes (netlink(7)).
                rest = rest.get((message.header.length as usize).next_multiple_of(4).max(16)..).unwrap_or_default();
                if let NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) = message.payload {
                    take(*response);
                } else if let NetlinkPayload::Error(error) = &message.payload
                    && error.code.is_some()
                {
                    return Err(error.to_io());
                } else if matches!(message.payload, NetlinkPayload::Error(_) | NetlinkPayload::Done(_)) {
                    return Ok(());
                } else if message.payload != NetlinkPayload::Noop {
                    // Above all an overrun: sockets may be missing, so the result cannot be used.
                    return Err(io::Error::other("unexpected sock_diag message"));
                }
            }
        }
    }
}

fn socket(response: &InetResponse) -> TcpSocket {
    let InetResponse { header, nlas } = response;
    let id = &header.socket_id;
    let at = |address: std::net::IpAddr, port| SocketAddr::new(address.to_canonical(), port);
    let cgroup = nlas.iter().find_map(|nla| {
        let Nla::Other(other) = nla else { return None };
        let mut value = [0; 8];
        (other.kind() == CGROUP_ID && other.value_len() == value.len()).then(|| {
            other.emit_value(&mut value);
            u64::from_ne_bytes(value)
        })
    });
    TcpSocket {
        local: at(id.source_address, id.source_port),
        remote: at(id.destination_address, id.destination_port),
        inode: header.inode,
        cgroup,
        state: header.state,
        family: header.family,
        id: id.clone(),
    }
}
