//! Owns a dial, from DIAL_REQ to its record: one function, a phase after the other.
//! Called by `session`, a task for each dial.
//! Must never connect without a permit, and never to another address than the one that was judged.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use guard_policy::{authorize::Permit, refusal::Refusal};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::TcpStream,
    sync::{Semaphore, mpsc},
    time::{Instant as Deadline, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::services::known::{Denied, Named, Services},
    dial::{
        answer,
        audit::{
            entry::{Audit, Entry},
            record::Verdict,
        },
        budget::Budget,
        connections::{CloseReason, Connections, Open, RefusedDial},
        gate::gate,
        kubelet::check::{Certificates, CheckError},
        limits::Limits,
        queue::{Queue, Queued, queue},
        relay::{Relayed, relay, reset},
    },
    kernel::{pinholes::Pinholes, syscalls::socket_cookie},
    wire::frames::{DialRequest, Packet, dial_failed, dialled},
};

/// How much the kernel may hold for a backend beyond what is on its way, bytes. By default it takes megabytes and says that there is room
/// again when a third is free: a slow reader then looks for long like one that does not read.
const UNSENT: u32 = 256 << 10;

/// What every dial needs.
pub struct Dialer {
    /// The register, and the ruleset that judges.
    pub connections: Arc<Connections>,
    /// The way through this node's kernel.
    pub pinholes: Arc<dyn Pinholes>,
    /// Where the record of each dial goes.
    pub audit: Arc<Audit>,
    /// The serving certificates that were checked.
    pub certificates: Certificates,
    /// Which endpoints are behind a ClusterIP.
    pub services: Services,
    /// What waits for backends, and the limits.
    pub budget: Arc<Budget>,
    pending: Semaphore,
}

/// What a dial needs of the stream that it came on.
pub struct Origin {
    /// Where answers go.
    pub outbound: mpsc::Sender<Packet>,
    /// The server that asked, for the record.
    pub server_id: Arc<str>,
    /// The control plane gave up waiting, or the stream ended.
    pub abandoned: CancellationToken,
    /// The stream ended.
    pub lost: CancellationToken,
    /// Where the stream's bytes go.
    pub routes: Arc<dyn Routes>,
}

/// Where the frames of a stream go.
pub trait Routes: Send + Sync + 'static {
    /// Bytes of this connection go here from now on.
    fn opened(&self, id: i64, queue: Queue);
    /// The connection is over.
    fn closed(&self, id: i64);
    /// The dial was answered, or needs no answer: it is no longer under way.
    fn answered(&self, random: i64, dial: &CancellationToken);
}

/// A dial that was answered with a connection.
struct Connected {
    open: Open,
    backend: TcpStream,
    queued: Queued,
    entry: Entry,
}

/// Why a dial came to nothing.
enum Failure {
    /// With what there is to say beyond the reason.
    Refused(Refusal, Option<String>),
    Unreachable(answer::Unreachable),
    Abandoned,
}

impl Dialer {
    /// A dialer with nothing under way.
    pub fn new(
        connections: Arc<Connections>,
        pinholes: Arc<dyn Pinholes>,
        audit: Arc<Audit>,
        limits: Limits,
        services: Services,
    ) -> Arc<Dialer> {
        let (certificates, pending) = (Certificates::default(), Semaphore::new(limits.dials));
        Arc::new(Dialer { connections, pinholes, audit, certificates, services, budget: Budget::new(limits), pending })
    }

    /// Serves one dial to its end. `under_way` is held until it is answered.
    pub async fn serve(&self, request: DialRequest, origin: Origin, under_way: Arc<()>) {
        // What a dial needs is given back when it is answered: most connections then rest.
        let connected = Box::pin(self.answered(&request, &origin)).await;
        origin.routes.answered(request.random, &origin.abandoned);
        drop((under_way, request));
        let Some(Connected { open, backend, queued, mut entry }) = connected else { return };
        entry.open();
        // After DIAL_RSP there is one close reason.
        let ending = open.ending.clone();
        let watch_stream = async {
            origin.lost.cancelled().await;
            ending.end(CloseReason::TunnelLost);
            std::future::pending().await
        };
        let relayed = tokio::select! {
            relayed = carry(backend, queued, &open, &origin.outbound) => relayed,
            relayed = watch_stream => relayed,
        };
        origin.routes.closed(open.id);
        entry.closed(&relayed);
    }

    /// Dials and answers. Nothing where the answer is an error, or nobody waits for one.
    async fn answered(&self, request: &DialRequest, origin: &Origin) -> Option<Connected> {
        let mut entry = self.audit.begin(&origin.server_id, &request.address);
        let full = self.connections.counts().open >= self.budget.limits().connections as u64;
        let pending = self.pending.try_acquire().ok().filter(|_| !full);
        // Parse, resolve, judge, connect: before DIAL_RSP every failure is one error answer.
        let connecting = async {
            if pending.is_none() {
                return Err(Failure::Refused(Refusal::Busy, None));
            }
            self.connect(request, &mut entry).await
        };
        let connected = tokio::select! {
            biased;
            () = origin.abandoned.cancelled() => Err(Failure::Abandoned),
            connected = connecting => connected,
        };
        let (permit, backend) = match connected {
            Ok(connected) => connected,
            Err(failure) => return self.answer(request, origin, entry, failure).await,
        };
        // Judge once more and register: the ruleset may have changed while the backend was dialled.
        let open = match self.connections.open(permit) {
            Ok(open) => open,
            Err(refusal) => return self.answer(request, origin, entry, Failure::Refused(refusal, None)).await,
        };
        entry.judged(open.permit.address(), Some(open.permit.rule()));
        // The route is there before the answer: DATA may follow it at once.
        let (queue, queued) = queue(&self.budget, open.ending.clone());
        origin.routes.opened(open.id, queue);
        if origin.abandoned.is_cancelled() || origin.outbound.send(dialled(request.random, open.id)).await.is_err() {
            origin.routes.closed(open.id);
            reset(&backend);
            return self.answer(request, origin, entry, Failure::Abandoned).await;
        }
        Some(Connected { open, backend, queued, entry })
    }

    /// Refuses a dial that comes while too many of its stream are under way: at once, and without an answer where the wire is full.
    pub fn refuse(&self, request: &DialRequest, origin: &Origin) {
        let entry = self.audit.begin(&origin.server_id, &request.address);
        if let Some(text) = self.record(request, origin, entry, Failure::Refused(Refusal::Busy, None)) {
            let _ = origin.outbound.try_send(dial_failed(request.random, text));
        }
    }

    async fn connect(&self, request: &DialRequest, entry: &mut Entry) -> Result<(Permit, TcpStream), Failure> {
        let deadline = Deadline::now() + self.budget.limits().dial;
        if request.protocol != "tcp" {
            return Err(Failure::Refused(Refusal::Protocol, None));
        }
        let (host, port) = split(&request.address).ok_or(Failure::Refused(Refusal::Malformed, None))?;
        let addresses = self.resolve(host, port, deadline).await?;
        let ruleset = self.connections.ruleset();
        let range = ruleset.as_ref().map(|ruleset| &ruleset.services);
        let mut failure = Failure::Unreachable(answer::lookup(host, "no such host"));
        // A Service's address is those of its endpoints; any other is itself.
        let mut targets = Vec::new();
        for address in addresses {
            match self.services.targets(address, range) {
                Ok(behind) => targets.extend(behind),
                Err(Denied { address, refusal, more }) => {
                    entry.judged(address, None);
                    failure = Failure::Refused(refusal, more);
                }
            }
        }
        for target in targets {
            let permit = match self.connections.authorize(target.address) {
                Ok(permit) => permit,
                Err(refusal) => {
                    let (refusal, more) = self.services.told(refusal, &target);
                    entry.judged(target.address, None);
                    failure = Failure::Refused(refusal, more);
                    continue;
                }
            };
            entry.judged(permit.address(), Some(permit.rule()));
            entry.behind(target.service.as_ref());
            if let Err(failed) = self.check_certificates(&permit, deadline).await {
                failure = failed;
                continue;
            }
            match self.connect_to(&permit, deadline).await {
                Ok(backend) => return Ok((permit, backend)),
                Err(error) => failure = Failure::Unreachable(answer::connect(permit.address(), &error)),
            }
        }
        Err(failure)
    }

    /// What the policy asks of the serving certificate holds, as of now.
    async fn check_certificates(&self, permit: &Permit, deadline: Deadline) -> Result<(), Failure> {
        for demand in &permit.demands().certificates {
            let check = self.certificates.check(permit.address(), demand, self.connect_to(permit, deadline));
            match timeout_at(deadline, check).await {
                Ok(Ok(())) => {}
                Ok(Err(CheckError::Unreachable(error))) => {
                    return Err(Failure::Unreachable(answer::connect(permit.address(), &error)));
                }
                Ok(Err(CheckError::Refused(why))) => {
                    return Err(Failure::Refused(Refusal::KubeletCertificate, Some(why)));
                }
                Err(_elapsed) => {
                    return Err(Failure::Unreachable(answer::connect(
                        permit.address(),
                        &io::ErrorKind::TimedOut.into(),
                    )));
                }
            }
        }
        Ok(())
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
        match self.services.named(host) {
            Named::Service(all) => return Ok(all.into_iter().map(|address| SocketAddr::new(address, port)).collect()),
            Named::Unread(why) => return Err(Failure::Refused(Refusal::ServicesUnread, why)),
            Named::Nothing => {}
        }
        let failed = |why: &str| Failure::Unreachable(answer::lookup(host, why));
        match timeout_at(deadline, tokio::net::lookup_host((host, port))).await {
            Ok(Ok(addresses)) => Ok(addresses.collect()),
            Ok(Err(_)) => Err(match self.services.unresolved(host) {
                Some((refusal, more)) => Failure::Refused(refusal, Some(more)),
                None => failed("no such host"),
            }),
            Err(_elapsed) => Err(failed("i/o timeout")),
        }
    }

    /// Connects to the address of a permit, through a pinhole of its own.
    async fn connect_to(&self, permit: &Permit, deadline: Deadline) -> io::Result<TcpStream> {
        let address = permit.address();
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        let keepalive =
            socket2::TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(15));
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_notsent_lowat(UNSENT)?;
        let cookie = socket_cookie(socket.as_fd())?;
        self.pinholes.register(cookie).map_err(io::Error::other)?;
        let connected = match timeout_at(deadline, connect(socket, address)).await {
            Ok(connected) => connected,
            Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
        };
        connected.inspect_err(|_| self.pinholes.forget(cookie))
    }

    /// Writes the record, and tells the control plane. There is no connection.
    async fn answer(
        &self,
        request: &DialRequest,
        origin: &Origin,
        entry: Entry,
        failure: Failure,
    ) -> Option<Connected> {
        if let Some(text) = self.record(request, origin, entry, failure) {
            let _ = origin.outbound.send(dial_failed(request.random, text)).await;
        }
        None
    }

    /// Writes the record; what there is to tell the control plane.
    fn record(&self, request: &DialRequest, origin: &Origin, entry: Entry, failure: Failure) -> Option<String> {
        let (verdict, reason, text) = match failure {
            Failure::Abandoned => {
                let reason = if origin.lost.is_cancelled() { "tunnel-lost" } else { "control-plane-gave-up" };
                entry.ended(Verdict::Abandoned, reason, None);
                return None;
            }
            Failure::Unreachable(answer::Unreachable { reason, text }) => {
                self.connections.fail(reason == answer::TIMEOUT);
                (Verdict::Failed, reason, text)
            }
            Failure::Refused(refusal, more) => {
                let text = answer::refused(&request.address, refusal, more.as_deref());
                self.connections.refuse(RefusedDial {
                    time: format!("{:.3}", jiff::Timestamp::now()),
                    requested: entry.requested().to_owned(),
                    address: entry.address(),
                    reason: refusal.name(),
                    message: more.map_or_else(|| refusal.to_string(), |more| format!("{refusal}: {more}")),
                });
                (Verdict::Refused, refusal.name(), text)
            }
        };
        entry.ended(verdict, reason, Some(&text));
        Some(text)
    }
}

/// Connects. To an address of this node and to most of its pods that is over when the system call returns: then nothing waits for the event
/// loop, and the answer goes out with whatever else there is to send.
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

/// Everything between DIAL_RSP and the end.
async fn carry(mut backend: TcpStream, mut queued: Queued, open: &Open, outbound: &mpsc::Sender<Packet>) -> Relayed {
    if open.permit.demands().tls
        && let Err(reason) = gate(&mut backend, &mut queued, &open.ending).await
    {
        open.ending.end(reason);
    }
    relay(backend, queued, open.id, outbound, &open.ending).await
}

/// `host:port` or `[v6]:port`, strictly: a zone, a named port or anything else is none.
fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let digits = !port.starts_with('0') && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = digits.then(|| port.parse::<u16>().ok()).flatten()?;
    let letters =
        |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok().then_some(v6),
        None => (!host.is_empty() && host.len() <= 253 && letters(host) && !is_odd_v4(host)).then_some(host),
    };
    Some((host?, port))
}

/// An IPv4 address in a spelling that resolvers read and nobody writes: octal, hexadecimal, fewer than four parts.
fn is_odd_v4(host: &str) -> bool {
    let last = host.strip_suffix('.').unwrap_or(host).rsplit('.').next().unwrap_or_default();
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let hex = last.strip_prefix("0x").or(last.strip_prefix("0X"));
    let number = digits(last) || hex.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    number && host.parse::<Ipv4Addr>().is_err()
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
            ("node-1.:65535", ("node-1.", 65535)),
            ("_a.b_c:443", ("_a.b_c", 443)),
            ("10.example:80", ("10.example", 80)),
            ("[::ffff:10.0.0.1]:80", ("::ffff:10.0.0.1", 80)),
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
            "a:080",
            "a:00",
            "a: 80",
            "a:-1",
            "a:80\n",
            "a:８０",
            "ä:80",
            "a%00:80",
            "a\0:80",
            "user@a:80",
            "http://a:80",
            "unix:/run/x:1",
            "010.0.0.1:80",
            "127.1:80",
            "2130706433:80",
            "0x7f.0.0.1:80",
            "0x7f000001:80",
            "1.2.3.4.:80",
            "1.2.3.4.5:80",
            "1.2.3.256:80",
            "[10.0.0.1]:80",
            "[::1:80",
            "::1]:80",
            "[[::1]]:80",
            "[::1]:",
            "[]:80",
            "[::ffff:1.2.3.4%1]:80",
        ] {
            assert_eq!(split(text), None, "{text}");
        }
    }
}
