//! Owns the set-up of one stream: TCP, TLS, HTTP/2, the method, the server's headers.
//! Called by `supervisor`, once for each attempt.
//! Must never make a second connection under a stream: a new one may reach another server behind the same address.

use std::{
    error::Error,
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
        http_connect,
        http_connect::ConnectProxyError,
        remote_host::{RemoteHost, ServerAddress},
        tls,
    },
    sys::error_chain::{chain, with_causes},
    tunnel::{
        settings::TunnelConfig,
        stream::{
            batch::{Batched, GATHERED},
            credentials::{Credentials, CredentialsError},
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
/// The server ends a connection that is probed more often (its enforcement policy, since v0.0.33).
const KEEPALIVE_AT_LEAST: Duration = Duration::from_secs(30);
/// Through an HTTP proxy only these probes reach the server: the kernel's end at the proxy.
const KEEPALIVE_PROXIED: Duration = Duration::from_secs(60);
/// How long a probe may stay unanswered.
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);
/// How many bytes are read from the socket at once: rustls itself asks for 4 KiB.
pub const READ_AHEAD: usize = 64 << 10;
/// How many messages may wait for the wire: at 256 KiB each, 4 MiB.
const OUTBOUND: usize = 16;
/// How many unacknowledged bytes the server may send: one stream carries everything.
pub(crate) const WINDOW: u32 = 4 << 20;

/// How long the connection may be silent before the kernel probes the other end, and how often: a load balancer that vanished sends
/// nothing, and the probes of HTTP/2 must be rare.
const SILENT: Duration = Duration::from_secs(10);
const PROBE: Duration = Duration::from_secs(2);
/// How long sent bytes or probes may stay unanswered. It counts from the last received segment, not from the first probe (tcp(7),
/// TCP_USER_TIMEOUT), and replaces the number of probes: several have to fit in, or one lost packet ends a stream.
const UNANSWERED: Duration = Duration::from_secs(20);
const _: () = assert!(SILENT.as_secs() + 4 * PROBE.as_secs() < UNANSWERED.as_secs());

/// One attempt.
pub(crate) struct Attempt {
    /// The number of the stream.
    pub(crate) number: u64,
    /// The host that the certificate must be for.
    pub(crate) host: RemoteHost,
    /// The address to connect to.
    pub(crate) address: ServerAddress,
    /// Unique to the stream: a server mixes up connections of streams that share one (issue 894).
    pub(crate) agent_id: String,
    /// What the control plane may dial this agent by.
    pub(crate) identifiers: String,
}

/// A stream that the server has answered.
pub struct Stream {
    /// Its number.
    pub number: u64,
    /// Messages from the server.
    pub inbound: Streaming<Packet>,
    /// Messages to the server; the only way to the wire.
    pub outbound: mpsc::Sender<Packet>,
    /// What the server calls itself.
    pub server_id: String,
    /// The number of servers that it advertises.
    pub server_count: u32,
    /// Version and key exchange.
    pub tls: String,
    /// Cancelled when the server sends GOAWAY.
    pub going: CancellationToken,
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The credential files cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// No TCP connection.
    #[error("cannot connect")]
    Tcp(#[source] io::Error),
    /// No connection through the HTTP proxy.
    #[error(transparent)]
    Proxy(#[from] ConnectProxyError),
    /// No answer in time.
    #[error("no answer within {PATIENCE:?} ({0})")]
    Patience(&'static str),
    /// TLS refused the server, or the server refused us.
    #[error("{message} (check: {check})")]
    Handshake {
        /// Which check.
        check: &'static str,
        /// What is wrong.
        message: String,
    },
    /// HTTP/2 did not come up. The text of tonic's error says nothing; its causes do.
    #[error("no HTTP/2 connection to the proxy-server: {}{HINT}", chain(.0))]
    Transport(tonic::transport::Error),
    /// The server refused the stream.
    #[error("the proxy-server refused the stream: {}{}", with_causes(.0.message().to_owned(), .0.source()), if is_broken(.0) { HINT } else { "" })]
    Refused(Box<Status>),
    /// The headers are not those of a proxy-server.
    #[error("the answer has no usable `{0}` header; check that this is the agent port of a proxy-server")]
    Header(&'static str),
    /// A configured value cannot be sent as a header.
    #[error("{0} cannot be sent as a header: only visible ASCII characters can")]
    Value(&'static str),
}

/// In TLS 1.3 a server refuses a client certificate after our side of the handshake is over.
const HINT: &str =
    "; the server closed right after the handshake: it may have refused our client certificate (expired? another CA?)";

impl ConnectError {
    /// The check that failed, as a stable word.
    pub fn check(&self) -> &'static str {
        match self {
            ConnectError::Credentials(_) | ConnectError::Value(_) => "files",
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

/// Makes one stream.
pub(crate) async fn connect(
    config: &TunnelConfig,
    credentials: &Credentials,
    attempt: Attempt,
) -> Result<Stream, ConnectError> {
    let Attempt { number, host, address, agent_id, identifiers } = attempt;
    let what = if host.http_proxy.is_some() { "the HTTP proxy, TCP and TLS" } else { "TCP and TLS" };
    let (transport, tls) = timeout(PATIENCE, handshake(config, credentials, &host, address))
        .await
        .map_err(|_| ConnectError::Patience(what))??;
    let keepalive = match &host.http_proxy {
        Some(_) => config.keepalive.min(KEEPALIVE_PROXIED),
        None => config.keepalive,
    };
    let keepalive = keepalive.max(KEEPALIVE_AT_LEAST);
    let endpoint = Endpoint::from_shared(format!("http://{host}"))
        .map_err(ConnectError::Transport)?
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .keep_alive_while_idle(true);
    let going = CancellationToken::new();
    let watched = Watched::new(Batched::new(transport), going.clone());
    let (outbound, answer) = ask(watched, endpoint, metadata(credentials, agent_id, identifiers)?).await?;
    let header = |name: &'static str| {
        let mut values = answer.metadata().get_all(name).iter();
        let value = values.next().and_then(|value| value.to_str().ok()).map(str::to_owned);
        value.filter(|_| values.next().is_none()).ok_or(ConnectError::Header(name))
    };
    let server_id = header("serverid")?;
    let server_count = count(&header("servercount")?);
    Ok(Stream { number, inbound: answer.into_inner(), outbound, server_id, server_count, tls, going })
}

/// Asks for the stream over an open connection: HTTP/2 with the agent's windows, the method with these headers. Returns the only sender to
/// the wire, and the server's answer. Fails if HTTP/2 does not come up, or if the server refuses or does not answer in time.
pub async fn ask<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    transport: S,
    endpoint: Endpoint,
    metadata: MetadataMap,
) -> Result<(mpsc::Sender<Packet>, Response<Streaming<Packet>>), ConnectError> {
    // There is no second connection.
    let transport = Mutex::new(Some(TokioIo::new(transport)));
    let connector = tower::service_fn(move |_| {
        let transport = transport.lock().ok().and_then(|mut transport| transport.take());
        std::future::ready(transport.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
    });
    let endpoint = endpoint.initial_stream_window_size(WINDOW).initial_connection_window_size(2 * WINDOW);
    let channel = endpoint.connect_with_connector(connector).await.map_err(ConnectError::Transport)?;
    let (outbound, packets) = mpsc::channel(OUTBOUND);
    // tonic makes the request; its body is ours.
    let mut messages = Some(Body::new(Messages::new(packets)));
    let mut client = Grpc::new(
        channel.map_request(move |request: http::Request<Body>| request.map(|none| messages.take().unwrap_or(none))),
    );
    client.ready().await.map_err(ConnectError::Transport)?;
    let request = Request::from_parts(metadata, Extensions::default(), tokio_stream::empty());
    let answer = timeout(PATIENCE, client.streaming(request, PathAndQuery::from_static(METHOD), PacketCodec));
    let answer = answer
        .await
        .map_err(|_| ConnectError::Patience("the server's headers"))?
        .map_err(|status| ConnectError::Refused(Box::new(status)))?;
    Ok((outbound, answer))
}

/// Reads the advertised number of servers. It is not trusted: a value that is out of range counts as one.
fn count(text: &str) -> u32 {
    let sensible = text.parse().ok().filter(|count| (1..=MOST_SERVERS).contains(count));
    sensible.unwrap_or_else(|| {
        tracing::warn!(claimed = text, "the advertised number of servers is out of range; it counts as one");
        1
    })
}

async fn handshake(
    config: &TunnelConfig,
    credentials: &Credentials,
    host: &RemoteHost,
    address: ServerAddress,
) -> Result<(tokio_rustls::client::TlsStream<BufReader<TcpStream>>, String), ConnectError> {
    let name = ServerName::try_from(host.at.name.clone()).map_err(|_| ConnectError::Value("--proxy-server-host"))?;
    let tcp = match (&host.http_proxy, address) {
        (Some(proxy), _) => http_connect::connect_to_proxy(proxy).await?,
        (None, ServerAddress::Direct(address)) => TcpStream::connect(address).await.map_err(ConnectError::Tcp)?,
        (None, ServerAddress::Proxied(_)) => return Err(ConnectError::Tcp(io::ErrorKind::AddrNotAvailable.into())),
    };
    tcp.set_nodelay(true).map_err(ConnectError::Tcp)?;
    let socket = socket2::SockRef::from(&tcp);
    let probes = socket2::TcpKeepalive::new().with_time(SILENT).with_interval(PROBE);
    socket.set_tcp_keepalive(&probes).map_err(ConnectError::Tcp)?;
    socket.set_tcp_user_timeout(Some(UNANSWERED)).map_err(ConnectError::Tcp)?;
    let mut buffered = BufReader::with_capacity(READ_AHEAD, tcp);
    if let Some(proxy) = &host.http_proxy {
        http_connect::request_connect(&mut buffered, proxy, &host.at).await?;
    }
    let tls = TlsConnector::from(Arc::clone(&credentials.client));
    let mut stream = tls.connect(name, buffered).await.map_err(|error| {
        let (check, message) = tls::explain(&error, &host.at.name, &config.files);
        ConnectError::Handshake { check, message }
    })?;
    let (_, session) = stream.get_mut();
    session.set_buffer_limit(Some(GATHERED));
    if session.alpn_protocol() != Some(b"h2") {
        return Err(ConnectError::Handshake {
            check: "alpn",
            message: "the proxy-server did not agree on h2; check that this is its agent port".to_owned(),
        });
    }
    let version = session.protocol_version().map(|version| format!("{version:?}")).unwrap_or_default();
    let group = session.negotiated_key_exchange_group().map(|group| format!(" {:?}", group.name())).unwrap_or_default();
    Ok((stream, format!("{version}{group}")))
}

fn metadata(credentials: &Credentials, agent_id: String, identifiers: String) -> Result<MetadataMap, ConnectError> {
    let value =
        |what: &'static str, text: String| AsciiMetadataValue::try_from(text).map_err(|_| ConnectError::Value(what));
    let mut metadata = MetadataMap::new();
    metadata.insert("agentid", value("--agent-id", agent_id)?);
    if !identifiers.is_empty() {
        metadata.insert("agentidentifiers", value("--agent-identifiers", identifiers)?);
    }
    if let Some(bearer) = &credentials.bearer {
        metadata.insert("authorization", bearer.clone());
    }
    Ok(metadata)
}

fn is_broken(status: &Status) -> bool {
    status.source().is_some()
}
