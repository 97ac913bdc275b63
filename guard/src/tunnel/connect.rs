//! Owns making one stream: TCP, TLS, HTTP/2, the method, the server's headers.
//! Called by `Tunnel::run`, once for each attempt.
//! Must never make a second connection under a stream: a new one may reach another server behind the same address.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{io::BufReader, net::TcpStream, sync::mpsc, time::timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::{AsciiMetadataValue, MetadataMap},
    transport::Endpoint,
};

use super::{
    TunnelConfig,
    batch::Batched,
    frame::{METHOD, Packet, PacketCodec},
    tls::{self, TlsError},
};

/// For TCP and TLS together, and for the server's headers: it may ask the API server about a token before it answers.
const PATIENCE: Duration = Duration::from_secs(10);
/// The server ends a connection that is probed oftener (its enforcement policy, since v0.0.33).
const KEEPALIVE_AT_LEAST: Duration = Duration::from_secs(30);
/// How long a probe may go unanswered.
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);
/// How much is read from the socket at once: rustls itself asks for 4 KiB.
const READ_AHEAD: usize = 64 << 10;
/// How many messages may wait for the wire: at 32 KiB each, 1 MiB.
const OUTBOUND: usize = 32;
/// How many bytes the server may have under way: one stream carries everything.
const WINDOW: u32 = 4 << 20;

/// A stream that the server has answered.
pub struct Stream {
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
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The files.
    #[error(transparent)]
    Files(#[from] TlsError),
    /// The token file.
    #[error("--service-account-token-path {path}: {error}")]
    Token {
        /// Its path.
        path: String,
        /// What is wrong.
        error: io::Error,
    },
    /// No TCP connection.
    #[error("cannot connect: {0}")]
    Tcp(#[source] io::Error),
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
            ConnectError::Files(_) | ConnectError::Token { .. } | ConnectError::Value(_) => "files",
            ConnectError::Tcp(_) => "tcp",
            ConnectError::Patience(_) => "patience",
            ConnectError::Handshake { check, .. } => check,
            ConnectError::Transport(_) => "transport",
            ConnectError::Refused(_) => "server",
            ConnectError::Header(_) => "headers",
        }
    }
}

/// Makes the stream. `number` makes the agent's id unique to it: a server mixes up connections of streams that share one (issue 894).
pub async fn connect(config: &TunnelConfig, number: u64) -> Result<Stream, ConnectError> {
    let (transport, tls) =
        timeout(PATIENCE, handshake(config)).await.map_err(|_| ConnectError::Patience("TCP and TLS"))??;
    let keepalive = config.keepalive.max(KEEPALIVE_AT_LEAST);
    let endpoint = Endpoint::from_shared(format!("http://{}:{}", bracketed(&config.host), config.port))?
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(2 * WINDOW);
    // One connection, made above: asked for another, there is none.
    let transport = Mutex::new(Some(TokioIo::new(Batched::new(transport))));
    let connector = tower::service_fn(move |_| {
        let transport = transport.lock().ok().and_then(|mut transport| transport.take());
        std::future::ready(transport.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
    });
    let channel = endpoint.connect_with_connector(connector).await?;
    let mut client = Grpc::new(channel);
    client.ready().await?;

    let (outbound, packets) = mpsc::channel(OUTBOUND);
    let mut request = Request::new(ReceiverStream::new(packets));
    *request.metadata_mut() = metadata(config, number)?;
    let answer = timeout(PATIENCE, client.streaming(request, PathAndQuery::from_static(METHOD), PacketCodec));
    let answer = answer
        .await
        .map_err(|_| ConnectError::Patience("the server's headers"))?
        .map_err(|status| ConnectError::Refused(Box::new(status)))?;
    let header = |name: &'static str| {
        let mut values = answer.metadata().get_all(name).iter();
        let value = values.next().and_then(|value| value.to_str().ok()).map(str::to_owned);
        value.filter(|_| values.next().is_none()).ok_or(ConnectError::Header(name))
    };
    let server_id = header("serverid")?;
    // The count is the server's word only: what is no sensible number is one.
    let server_count = header("servercount")?.parse().ok().filter(|count| (1..=1000).contains(count)).unwrap_or(1);
    Ok(Stream { inbound: answer.into_inner(), outbound, server_id, server_count, tls })
}

async fn handshake(
    config: &TunnelConfig,
) -> Result<(tokio_rustls::client::TlsStream<BufReader<TcpStream>>, String), ConnectError> {
    let client = tls::client_config(config)?;
    let name = ServerName::try_from(config.host.clone()).map_err(|error| TlsError::Host(config.host.clone(), error))?;
    let tcp = TcpStream::connect((config.host.as_str(), config.port)).await.map_err(ConnectError::Tcp)?;
    tcp.set_nodelay(true).map_err(ConnectError::Tcp)?;
    let connected = TlsConnector::from(Arc::new(client)).connect(name, BufReader::with_capacity(READ_AHEAD, tcp)).await;
    let stream = connected.map_err(|error| {
        let (check, message) = tls::explain(&error, config);
        ConnectError::Handshake { check, message }
    })?;
    let (_, session) = stream.get_ref();
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

fn metadata(config: &TunnelConfig, number: u64) -> Result<MetadataMap, ConnectError> {
    let value =
        |what: &'static str, text: String| AsciiMetadataValue::try_from(text).map_err(|_| ConnectError::Value(what));
    let mut metadata = MetadataMap::new();
    metadata.insert("agentid", value("--agent-id", format!("{}-{number}", config.agent_id))?);
    if !config.identifiers.is_empty() {
        metadata.insert("agentidentifiers", value("--agent-identifiers", config.identifiers.clone())?);
    }
    if let Some(path) = &config.token {
        let token = std::fs::read_to_string(path)
            .map_err(|error| ConnectError::Token { path: path.display().to_string(), error })?;
        let mut token = value("the token", format!("Bearer {}", token.trim()))?;
        token.set_sensitive(true);
        metadata.insert("authorization", token);
    }
    Ok(metadata)
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}
