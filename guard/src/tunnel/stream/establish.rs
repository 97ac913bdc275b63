//! Owns making one stream: TCP, TLS, HTTP/2, the method, the server's headers.
//! Called by `run`, once for each attempt.
//! Must never make a second connection under a stream: a new one may reach another server behind the same address.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::{
    Extensions, Request, Response, Status, Streaming,
    body::Body,
    client::Grpc,
    codegen::http::{self, uri::PathAndQuery},
    metadata::{AsciiMetadataValue, MetadataMap},
    transport::Endpoint,
};
use tower::util::ServiceExt;

use crate::{
    cluster::leases::MOST_SERVERS,
    net::{
        hosts::{Host, Place},
        http_connect,
        http_connect::ProxyFailed,
        tls,
    },
    tunnel::{
        settings::TunnelConfig,
        stream::{
            batch::{Batched, GATHERED},
            credentials::Material,
            goaway::Watched,
        },
    },
    wire::{
        bodies::Messages,
        frames::{METHOD, Packet, PacketCodec},
    },
};

/// For TCP and TLS together, and for the server's headers: it may ask the API server about a token before it answers.
const PATIENCE: Duration = Duration::from_secs(10);
/// The server ends a connection that is probed oftener (its enforcement policy, since v0.0.33).
const KEEPALIVE_AT_LEAST: Duration = Duration::from_secs(30);
/// Through an HTTP proxy only such probes tell whether the server is there: the kernel's end at the proxy.
const KEEPALIVE_PROXIED: Duration = Duration::from_secs(60);
/// How long a probe may go unanswered.
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);
/// How much is read from the socket at once: rustls itself asks for 4 KiB.
pub const READ_AHEAD: usize = 64 << 10;
/// How many messages may wait for the wire: at 256 KiB each, 4 MiB.
const OUTBOUND: usize = 16;
/// How many bytes the server may have under way: one stream carries everything.
pub(crate) const WINDOW: u32 = 4 << 20;

/// How long the connection may be silent before the kernel asks whether the other end is there, and how often: a load balancer that vanished
/// says nothing, and the probes of HTTP/2 must be rare.
const SILENT: Duration = Duration::from_secs(10);
const PROBE: Duration = Duration::from_secs(2);
/// How long nothing may be heard while something is owed. It counts from what was heard last, not from the first probe (tcp(7),
/// TCP_USER_TIMEOUT), and takes the place of a number of probes: several have to fit in between, or one lost packet ends a stream.
const UNANSWERED: Duration = Duration::from_secs(20);
const _: () = assert!(SILENT.as_secs() + 4 * PROBE.as_secs() < UNANSWERED.as_secs());

/// What is tried.
pub(crate) struct Attempt {
    /// The number of the stream.
    pub(crate) number: u64,
    /// Whose certificate it has to be.
    pub(crate) host: Host,
    /// Where.
    pub(crate) place: Place,
    /// Unique to the stream: a server mixes up connections of streams that share one (issue 894).
    pub(crate) agent_id: String,
    /// What the control plane may dial this agent by.
    pub(crate) identifiers: String,
}

/// A stream that the server has answered.
pub struct Stream {
    /// Its number.
    pub number: u64,
    /// From the server.
    pub inbound: Streaming<Packet>,
    /// To the server; the one way to the wire.
    pub outbound: mpsc::Sender<Packet>,
    /// What the server calls itself.
    pub server_id: String,
    /// How many servers it says there are.
    pub server_count: u32,
    /// Version and key exchange.
    pub tls: String,
    /// The server said that it is about to go.
    pub going: CancellationToken,
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The files.
    #[error("{0}")]
    Files(String),
    /// No TCP connection.
    #[error("cannot connect: {0}")]
    Tcp(#[source] io::Error),
    /// No way through the HTTP proxy.
    #[error(transparent)]
    Proxy(#[from] ProxyFailed),
    /// Nothing in time.
    #[error("no answer within {PATIENCE:?} ({0})")]
    Patience(&'static str),
    /// TLS refused the server, or the server refused us.
    #[error("{message} (check: {check})")]
    Handshake {
        /// Which check.
        check: &'static str,
        /// In words.
        message: String,
    },
    /// HTTP/2 did not come up.
    #[error("HTTP/2: {0}{HINT}")]
    Transport(#[from] tonic::transport::Error),
    /// The server refused the stream.
    #[error("the proxy-server refused the stream: {}{}", .0.message(), if is_broken(.0) { HINT } else { "" })]
    Refused(Box<Status>),
    /// The headers are not those of a proxy-server.
    #[error("the answer has no usable `{0}` header: is this the agent port of a proxy-server?")]
    Header(&'static str),
    /// A configured value cannot be sent as a header.
    #[error("{0} cannot be sent as a header: only visible ASCII characters can")]
    Value(&'static str),
}

/// In TLS 1.3 a server refuses a client certificate after our side of the handshake is over.
const HINT: &str =
    "; the server closed right after the handshake: it may have refused our client certificate (expired? another CA?)";

impl ConnectError {
    /// Which check failed, in a word.
    pub fn check(&self) -> &'static str {
        match self {
            ConnectError::Files(_) | ConnectError::Value(_) => "files",
            ConnectError::Tcp(_) => "tcp",
            ConnectError::Proxy(_) => "http-proxy",
            ConnectError::Patience(_) => "patience",
            ConnectError::Handshake { check, .. } => check,
            ConnectError::Transport(_) => "transport",
            ConnectError::Refused(_) => "server",
            ConnectError::Header(_) => "headers",
        }
    }
}

/// Makes the stream.
pub(crate) async fn connect(
    config: &TunnelConfig,
    material: &Material,
    attempt: Attempt,
) -> Result<Stream, ConnectError> {
    let Attempt { number, host, place, agent_id, identifiers } = attempt;
    let what = if host.through.is_some() { "the HTTP proxy, TCP and TLS" } else { "TCP and TLS" };
    let (transport, tls) = timeout(PATIENCE, handshake(config, material, &host, place))
        .await
        .map_err(|_| ConnectError::Patience(what))??;
    let keepalive = match &host.through {
        Some(_) => config.keepalive.min(KEEPALIVE_PROXIED),
        None => config.keepalive,
    };
    let keepalive = keepalive.max(KEEPALIVE_AT_LEAST);
    let endpoint = Endpoint::from_shared(format!("http://{host}"))?
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .keep_alive_while_idle(true);
    let going = CancellationToken::new();
    let watched = Watched::new(Batched::new(transport), going.clone());
    let (outbound, answer) = ask(watched, endpoint, metadata(material, agent_id, identifiers)?).await?;
    let header = |name: &'static str| {
        let mut values = answer.metadata().get_all(name).iter();
        let value = values.next().and_then(|value| value.to_str().ok()).map(str::to_owned);
        value.filter(|_| values.next().is_none()).ok_or(ConnectError::Header(name))
    };
    let server_id = header("serverid")?;
    let server_count = count(&header("servercount")?);
    Ok(Stream { number, inbound: answer.into_inner(), outbound, server_id, server_count, tls, going })
}

/// Asks for the stream over a connection that stands: HTTP/2 with the agent's windows, the method with these headers. The one way to the wire, and
/// the server's answer with the way from it. An error where HTTP/2 does not come up, or the server refuses or does not answer in time.
pub async fn ask<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    transport: S,
    endpoint: Endpoint,
    metadata: MetadataMap,
) -> Result<(mpsc::Sender<Packet>, Response<Streaming<Packet>>), ConnectError> {
    // Asked for another connection, there is none.
    let transport = Mutex::new(Some(TokioIo::new(transport)));
    let connector = tower::service_fn(move |_| {
        let transport = transport.lock().ok().and_then(|mut transport| transport.take());
        std::future::ready(transport.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
    });
    let endpoint = endpoint.initial_stream_window_size(WINDOW).initial_connection_window_size(2 * WINDOW);
    let channel = endpoint.connect_with_connector(connector).await?;
    let (outbound, packets) = mpsc::channel(OUTBOUND);
    // tonic makes the request; its body is ours.
    let mut messages = Some(Body::new(Messages::new(packets)));
    let mut client = Grpc::new(
        channel.map_request(move |request: http::Request<Body>| request.map(|none| messages.take().unwrap_or(none))),
    );
    client.ready().await?;
    let request = Request::from_parts(metadata, Extensions::default(), tokio_stream::empty());
    let answer = timeout(PATIENCE, client.streaming(request, PathAndQuery::from_static(METHOD), PacketCodec));
    let answer = answer
        .await
        .map_err(|_| ConnectError::Patience("the server's headers"))?
        .map_err(|status| ConnectError::Refused(Box::new(status)))?;
    Ok((outbound, answer))
}

/// How many servers there are is a server's word only: what is no sensible number is one.
fn count(text: &str) -> u32 {
    let sensible = text.parse().ok().filter(|count| (1..=MOST_SERVERS).contains(count));
    sensible.unwrap_or_else(|| {
        tracing::warn!(claimed = text, "a server claims a number of servers that cannot be; it counts as one");
        1
    })
}

async fn handshake(
    config: &TunnelConfig,
    material: &Material,
    host: &Host,
    place: Place,
) -> Result<(tokio_rustls::client::TlsStream<BufReader<TcpStream>>, String), ConnectError> {
    let name = ServerName::try_from(host.name.clone()).map_err(|_| ConnectError::Value("--proxy-server-host"))?;
    let tcp = match (&host.through, place) {
        (Some(proxy), _) => http_connect::reach(proxy).await?,
        (None, Place::Address(address)) => TcpStream::connect(address).await.map_err(ConnectError::Tcp)?,
        (None, Place::Proxied(_)) => return Err(ConnectError::Tcp(io::ErrorKind::AddrNotAvailable.into())),
    };
    tcp.set_nodelay(true).map_err(ConnectError::Tcp)?;
    let socket = socket2::SockRef::from(&tcp);
    let probes = socket2::TcpKeepalive::new().with_time(SILENT).with_interval(PROBE);
    socket.set_tcp_keepalive(&probes).map_err(ConnectError::Tcp)?;
    socket.set_tcp_user_timeout(Some(UNANSWERED)).map_err(ConnectError::Tcp)?;
    let mut buffered = BufReader::with_capacity(READ_AHEAD, tcp);
    if let Some(proxy) = &host.through {
        http_connect::ask(&mut buffered, proxy, host).await?;
    }
    let tls = TlsConnector::from(Arc::clone(&material.client));
    let mut stream = tls.connect(name, buffered).await.map_err(|error| {
        let (check, message) = tls::explain(&error, &host.name, &config.files);
        ConnectError::Handshake { check, message }
    })?;
    let (_, session) = stream.get_mut();
    session.set_buffer_limit(Some(GATHERED));
    if session.alpn_protocol() != Some(b"h2") {
        return Err(ConnectError::Handshake {
            check: "alpn",
            message: "the proxy-server did not agree on h2: is this its agent port?".to_owned(),
        });
    }
    let version = session.protocol_version().map(|version| format!("{version:?}")).unwrap_or_default();
    let group = session.negotiated_key_exchange_group().map(|group| format!(" {:?}", group.name())).unwrap_or_default();
    Ok((stream, format!("{version}{group}")))
}

fn metadata(material: &Material, agent_id: String, identifiers: String) -> Result<MetadataMap, ConnectError> {
    let value =
        |what: &'static str, text: String| AsciiMetadataValue::try_from(text).map_err(|_| ConnectError::Value(what));
    let mut metadata = MetadataMap::new();
    metadata.insert("agentid", value("--agent-id", agent_id)?);
    if !identifiers.is_empty() {
        metadata.insert("agentidentifiers", value("--agent-identifiers", identifiers)?);
    }
    if let Some(bearer) = &material.bearer {
        metadata.insert("authorization", bearer.clone());
    }
    Ok(metadata)
}

fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}
