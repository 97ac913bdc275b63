//! Owns a dial, from DIAL_REQ to its record: one function, a phase after the other.
//! Called by `session`, a task for each dial.
//! Must never connect without a permit, and never to another address than the one that was judged.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{Semaphore, mpsc},
    time::{Instant as Deadline, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    authorize::{Permit, Refusal},
    connections::{CloseReason, Connections, RefusedDial},
    kernel::sys::socket_cookie,
    relay::{Queue, queue, relay, reset},
    tunnel::frame::{DialRequest, Packet, dial_failed, dialled},
};

/// How long a dial may take, name resolution included: what the upstream agent allows.
const DIAL: Duration = Duration::from_secs(5);
/// How many dials may be under way at once.
const PENDING: usize = 512;

/// Lets a socket through the kernel half of this node, and takes that back.
pub trait Pinholes: Send + Sync + 'static {
    /// Before the socket with this cookie connects. An error refuses the dial.
    fn register(&self, cookie: u64) -> Result<(), String>;
    /// The socket did not connect.
    fn forget(&self, cookie: u64);
}

/// What every dial needs.
pub struct Dialer {
    /// The register, and the ruleset that judges.
    pub connections: Arc<Connections>,
    /// The way through this node's kernel.
    pub pinholes: Arc<dyn Pinholes>,
    pending: Semaphore,
}

/// What a dial needs of the stream that it came on.
pub struct Origin {
    /// Where answers go.
    pub outbound: mpsc::Sender<Packet>,
    /// The server that asked, for the record.
    pub server_id: String,
    /// The control plane gave up waiting, or the stream ended.
    pub abandoned: CancellationToken,
    /// The stream ended.
    pub lost: CancellationToken,
    /// Tells the session where the bytes of a connection go.
    pub route: Box<dyn Fn(i64, Queue) + Send + Sync>,
}

/// Why a dial came to nothing.
enum Failure {
    Refused(Refusal, Option<SocketAddr>),
    Unreachable(String),
    Abandoned,
}

impl Dialer {
    /// A dialer with nothing under way.
    pub fn new(connections: Arc<Connections>, pinholes: Arc<dyn Pinholes>) -> Arc<Dialer> {
        Arc::new(Dialer { connections, pinholes, pending: Semaphore::new(PENDING) })
    }

    /// Serves one dial to its end.
    pub async fn serve(&self, request: DialRequest, origin: Origin) {
        let started = Instant::now();
        // Parse, resolve, judge, connect: before DIAL_RSP every failure is one error answer.
        let connected = tokio::select! {
            biased;
            () = origin.abandoned.cancelled() => Err(Failure::Abandoned),
            connected = self.connect(&request) => connected,
        };
        let (permit, backend) = match connected {
            Ok(connected) => connected,
            Err(failure) => return self.answer(&request, &origin, failure).await,
        };
        // Judge once more and register: the ruleset may have changed while the backend was dialled.
        let open = match self.connections.open(permit.clone()) {
            Ok(open) => open,
            Err(refusal) => {
                return self.answer(&request, &origin, Failure::Refused(refusal, Some(permit.address()))).await;
            }
        };
        // The route is there before the answer: DATA may follow it at once.
        let (queue, queued) = queue(open.ending.clone());
        (origin.route)(open.id, queue);
        if origin.abandoned.is_cancelled() || origin.outbound.send(dialled(request.random, open.id)).await.is_err() {
            reset(&backend);
            return tracing::debug!(
                requested = request.address,
                "the control plane gave up while the backend was dialled"
            );
        }
        // After DIAL_RSP there is one close reason.
        let ending = open.ending.clone();
        let watch_stream = async {
            origin.lost.cancelled().await;
            ending.end(CloseReason::TunnelLost);
            std::future::pending::<()>().await;
        };
        let relayed = tokio::select! {
            relayed = relay(backend, queued, open.id, &origin.outbound, &open.ending) => relayed,
            () = watch_stream => return,
        };
        tracing::info!(
            target: "audit",
            verdict = "admitted",
            server = origin.server_id,
            requested = request.address,
            dialled = %permit.address(),
            rule = permit.rule(),
            to_backend = relayed.to_backend,
            to_control_plane = relayed.to_control_plane,
            milliseconds = started.elapsed().as_millis() as u64,
            reason = relayed.reason.name(),
            "dial closed"
        );
    }

    async fn connect(&self, request: &DialRequest) -> Result<(Permit, TcpStream), Failure> {
        let deadline = Deadline::now() + DIAL;
        if request.protocol != "tcp" {
            return Err(Failure::Refused(Refusal::Protocol, None));
        }
        let _pending = self.pending.try_acquire().map_err(|_| Failure::Refused(Refusal::Busy, None))?;
        let (host, port) = split(&request.address).ok_or(Failure::Refused(Refusal::Malformed, None))?;
        let addresses = self.resolve(host, port, deadline).await?;
        let mut failure = Failure::Unreachable(format!("dial tcp: lookup {host}: no such host"));
        for address in addresses {
            let permit = match self.connections.authorize(address) {
                Ok(permit) => permit,
                Err(refusal) => {
                    failure = Failure::Refused(refusal, Some(address));
                    continue;
                }
            };
            match self.connect_to(&permit, deadline).await {
                Ok(backend) => return Ok((permit, backend)),
                Err(error) => failure = Failure::Unreachable(reason(permit.address(), &error)),
            }
        }
        Err(failure)
    }

    /// The addresses of a host. The node's own names are its own addresses: its resolver often says loopback.
    async fn resolve(&self, host: &str, port: u16, deadline: Deadline) -> Result<Vec<SocketAddr>, Failure> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let node = self.connections.node();
        if node.names.contains(&host.to_lowercase()) {
            return Ok(node.addresses.iter().map(|address| SocketAddr::new(*address, port)).collect());
        }
        let failed = |why: &str| Failure::Unreachable(format!("dial tcp: lookup {host}: {why}"));
        match timeout_at(deadline, tokio::net::lookup_host((host, port))).await {
            Ok(Ok(addresses)) => Ok(addresses.collect()),
            Ok(Err(_)) => Err(failed("no such host")),
            Err(_elapsed) => Err(failed("i/o timeout")),
        }
    }

    /// Connects to the address of a permit, through a pinhole of its own.
    async fn connect_to(&self, permit: &Permit, deadline: Deadline) -> io::Result<TcpStream> {
        let address = permit.address();
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        let keepalive =
            socket2::TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(15));
        socket2::SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        let cookie = socket_cookie(socket.as_fd())?;
        self.pinholes.register(cookie).map_err(io::Error::other)?;
        let connected = match timeout_at(deadline, socket.connect(address)).await {
            Ok(connected) => connected,
            Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
        };
        match connected {
            Ok(backend) => {
                backend.set_nodelay(true)?;
                Ok(backend)
            }
            Err(error) => {
                self.pinholes.forget(cookie);
                Err(error)
            }
        }
    }

    async fn answer(&self, request: &DialRequest, origin: &Origin, failure: Failure) {
        let DialRequest { address: requested, random, .. } = request;
        let server = origin.server_id.as_str();
        let text = match failure {
            Failure::Abandoned => return tracing::debug!(requested, "the control plane gave up waiting for the dial"),
            Failure::Unreachable(text) => {
                self.connections.fail(text.ends_with("i/o timeout"));
                tracing::warn!(target: "audit", verdict = "failed", server, requested, error = text, "dial failed");
                text
            }
            Failure::Refused(refusal, address) => {
                let text = format!("nodeguard refuses {requested}: {refusal}");
                let judged = address.map(|address| address.to_string());
                tracing::warn!(target: "audit", verdict = "refused", server, requested, address = judged, reason = refusal.name(), "dial refused");
                let time = format!("{:.3}", jiff::Timestamp::now());
                self.connections.refuse(RefusedDial {
                    time,
                    requested: requested.clone(),
                    address,
                    reason: refusal.name(),
                    message: refusal.to_string(),
                });
                text
            }
        };
        let _ = origin.outbound.send(dial_failed(*random, text)).await;
    }
}

/// `host:port` or `[v6]:port`, strictly: a zone, a named port or anything else is none.
fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| port.parse::<u16>().ok())
        .flatten()
        .filter(|port| *port != 0)?;
    let letters =
        |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok().then_some(v6),
        None => (!host.is_empty() && host.len() <= 253 && letters(host)).then_some(host),
    };
    Some((host?, port))
}

/// A connect error in the words that the server and its users look for (Go's).
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error is told in the system's own words")]
fn reason(address: SocketAddr, error: &io::Error) -> String {
    let words = match error.kind() {
        io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        io::ErrorKind::ConnectionReset => "connect: connection reset by peer".to_owned(),
        io::ErrorKind::TimedOut => "i/o timeout".to_owned(),
        io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
        io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        _ => format!("connect: {error}"),
    };
    format!("dial tcp {address}: {words}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_and_port_is_an_address() {
        let good = [
            ("10.0.0.1:80", ("10.0.0.1", 80)),
            ("[fd00::1]:10250", ("fd00::1", 10250)),
            ("node-1.example:1", ("node-1.example", 1)),
        ];
        for (text, want) in good {
            assert_eq!(split(text), Some(want), "{text}");
        }
        for text in [
            "",
            ":80",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "a:+80",
            "a:http",
            "fd00::1:80",
            "[fd00::1%eth0]:80",
            "[a]:80",
            "a b:80",
            "/run/x:1",
            "[::1]x:80",
            "a:80:90",
        ] {
            assert_eq!(split(text), None, "{text}");
        }
    }

    #[test]
    fn errors_are_in_the_words_the_server_looks_for() {
        let address = "10.0.0.1:80".parse().unwrap();
        let text = reason(address, &io::Error::from_raw_os_error(libc::ECONNREFUSED));
        assert_eq!(text, "dial tcp 10.0.0.1:80: connect: connection refused");
        assert!(reason(address, &io::ErrorKind::TimedOut.into()).contains("i/o timeout"));
    }
}
