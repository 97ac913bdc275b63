//! Owns the socket to a backend: its options, its pinhole, its connect.
//! Called by `serve`, for the dial itself and for the check of kubelet's certificate.
//! Must never connect without a permit, and never to another address than the permit's.

use std::{io, net::SocketAddr, os::fd::AsFd, time::Duration};

use guard_policy::authorize::Permit;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

use crate::kernel::{
    pinholes::{PinholeError, Pinholes},
    syscalls::socket_cookie,
};

/// How many unsent bytes the kernel buffers for a backend. Its default is megabytes and it reports room only when a third is free, so a slow
/// reader would look for a long time like a backend that does not read.
const UNSENT: u32 = 256 << 10;
/// How long a connection may rest before it is probed, and the time between two probes.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Why a backend was not connected.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The time of the dial was over.
    #[error("i/o timeout")]
    TimedOut,
    /// The kernel half has no room for the socket.
    #[error(transparent)]
    Pinhole(#[from] PinholeError),
    /// The socket could not be made or connected.
    #[error(transparent)]
    Socket(#[from] io::Error),
}

/// A registered socket. Dropping it takes the registration back.
struct Registration<'a> {
    pinholes: &'a dyn Pinholes,
    cookie: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.pinholes.forget(self.cookie);
    }
}

/// Connects to the address of a permit through a pinhole of its own.
pub(crate) async fn connect_backend(
    pinholes: &dyn Pinholes,
    permit: &Permit,
    deadline: Instant,
) -> Result<TcpStream, BackendError> {
    let address = permit.address();
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT)?;
    let cookie = socket_cookie(socket.as_fd())?;
    pinholes.register(cookie)?;
    let registration = Registration { pinholes, cookie };
    let stream = timeout_at(deadline, connect(socket, address)).await.map_err(|_elapsed| BackendError::TimedOut)??;
    // The connection used the registration up.
    std::mem::forget(registration);
    Ok(stream)
}

/// Connects. To an address of this node and to most of its pods, that is done when the system call returns: then nothing waits for the event
/// loop, and the answer goes out together with whatever else there is to send.
async fn connect(socket: Socket, address: SocketAddr) -> io::Result<TcpStream> {
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    let stream = TcpStream::from_std(socket.into())?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    if stream.peer_addr().is_err() {
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    Ok(stream)
}
