//! Owns a server of the agent protocol in Rust, for what the real one never does: as fast as can be, or hostile.
//! Called by the tunnel bench (our own limit) and by `hostile` (its manners).
//! Must never stand in for the real server where that can do the job.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    task::{Context as Waker, Poll, ready},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nodeguard::{
    tunnel::stream::{
        batch::{Batched, GATHERED},
        establish::READ_AHEAD,
    },
    wire::frames::{CloseDial, CloseRequest, Data, DialRequest, DialResponse, Packet, Payload},
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader, ReadBuf},
    net::TcpListener,
    sync::{Notify, mpsc, oneshot},
    task::JoinHandle,
    time::{Sleep, sleep},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, server::StreamingService};
use tonic_prost::ProstCodec;

use crate::certs::{Certs, roots};

/// What kinds of packets a server sends, by number.
pub mod kind {
    /// A dial.
    pub const DIAL_REQ: i32 = 0;
    /// The end of a connection.
    pub const CLOSE_REQ: i32 = 2;
    /// Bytes.
    pub const DATA: i32 = 4;
    /// The end of a dial under way.
    pub const DIAL_CLS: i32 = 5;
}

/// How a server behaves before any packet.
#[derive(Clone, Debug)]
pub struct Manners {
    /// What it calls itself.
    pub server_id: String,
    /// How many servers it says there are.
    pub server_count: String,
    /// Whether it ever sends its headers.
    pub answers: bool,
    /// How long it waits before each byte that it sends, once TLS is up.
    pub pause: Option<Duration>,
}

impl Default for Manners {
    fn default() -> Manners {
        Manners { server_id: "fake".to_owned(), server_count: "1".to_owned(), answers: true, pause: None }
    }
}

/// A stream that an agent opened.
pub struct Agent {
    /// Its certificate.
    pub certificate: Option<CertificateDer<'static>>,
    /// Its id, and what it may be dialled by.
    pub agent_id: String,
    /// The same.
    pub identifiers: String,
    /// From the agent.
    pub inbound: Streaming<Packet>,
    /// To the agent.
    pub outbound: mpsc::Sender<Result<Packet, Status>>,
}

/// A running server; it ends when this is dropped.
pub struct Fake {
    /// How many connections came so far.
    pub accepted: Arc<AtomicUsize>,
    agents: mpsc::Receiver<Agent>,
    goaway: Arc<Notify>,
    tls: Arc<Mutex<TlsAcceptor>>,
    task: JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    /// Listens with the lab's server certificate, and asks agents for theirs.
    pub async fn start(address: SocketAddr, certs: &Certs, manners: Manners) -> Result<Fake> {
        let tls = Arc::new(Mutex::new(acceptor(certs)?));
        let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
        let (connected, agents) = mpsc::channel(64);
        let (accepted, goaway): (Arc<AtomicUsize>, Arc<Notify>) = Default::default();
        let server = Server { tls: Arc::clone(&tls), manners, connected, goaway: Arc::clone(&goaway) };
        let task = tokio::spawn(accept(listener, server, Arc::clone(&accepted)));
        Ok(Fake { accepted, agents, goaway, tls, task })
    }

    /// From the next connection on, with what these certificates are now.
    pub fn renew(&self, certs: &Certs) -> Result<()> {
        *self.tls.lock().unwrap_or_else(PoisonError::into_inner) = acceptor(certs)?;
        Ok(())
    }

    /// Tells every agent that this server is about to go, and serves what is open.
    pub fn go_away(&self) {
        self.goaway.notify_waiters();
    }

    /// The next stream that an agent opens.
    pub async fn agent(&mut self) -> Result<Agent> {
        self.agents.recv().await.context("the fake server has ended")
    }
}

/// TLS as `ca.crt` and `server.crt` say.
fn acceptor(certs: &Certs) -> Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(&certs.path("ca.crt"))?), Arc::clone(&provider))
            .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(certs.path("server.crt"))?],
            PrivateKeyDer::from_pem_file(certs.path("server.key"))?,
        )?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// What every connection is served with.
#[derive(Clone)]
struct Server {
    tls: Arc<Mutex<TlsAcceptor>>,
    manners: Manners,
    connected: mpsc::Sender<Agent>,
    goaway: Arc<Notify>,
}

async fn accept(listener: TcpListener, server: Server, accepted: Arc<AtomicUsize>) {
    // Connections end with the server.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        accepted.fetch_add(1, Ordering::Relaxed);
        let Server { tls, manners, connected, goaway } = server.clone();
        let tls = tls.lock().unwrap_or_else(PoisonError::into_inner).clone();
        connections.spawn(async move {
            tcp.set_nodelay(true)?;
            let mut accepted = tls.accept(BufReader::with_capacity(READ_AHEAD, tcp)).await?;
            accepted.get_mut().1.set_buffer_limit(Some(GATHERED));
            let shown = accepted.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let certificate = shown.map(|certificate| certificate.clone().into_owned());
            // As cheap as can be: what it costs is taken from the agents that are measured under it.
            let stream = Batched::new(Slow { pause: manners.pause, sleep: None, stream: accepted });
            let service = service_fn(move |request: hyper::Request<Incoming>| {
                let method =
                    Method { manners: manners.clone(), connected: connected.clone(), certificate: certificate.clone() };
                async move {
                    let codec: ProstCodec<Packet, Packet> = ProstCodec::default();
                    Ok::<_, std::convert::Infallible>(tonic::server::Grpc::new(codec).streaming(method, request).await)
                }
            });
            let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            server.initial_stream_window_size(4 << 20).initial_connection_window_size(8 << 20);
            let mut serving = std::pin::pin!(server.serve_connection(TokioIo::new(stream), service));
            tokio::select! {
                served = &mut serving => return Ok(served?),
                () = goaway.notified() => serving.as_mut().graceful_shutdown(),
            }
            serving.await?;
            anyhow::Ok(())
        });
        while connections.try_join_next().is_some() {}
    }
}

/// `/AgentService/Connect`.
struct Method {
    manners: Manners,
    connected: mpsc::Sender<Agent>,
    certificate: Option<CertificateDer<'static>>,
}

impl StreamingService<Packet> for Method {
    type Response = Packet;
    type ResponseStream = ReceiverStream<Result<Packet, Status>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Packet>>) -> Self::Future {
        let (manners, connected) = (self.manners.clone(), self.connected.clone());
        let certificate = self.certificate.clone();
        let said = |name: &str| {
            let value = request.metadata().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let (agent_id, identifiers) = (said("agentid"), said("agentidentifiers"));
        Box::pin(async move {
            if !manners.answers {
                std::future::pending::<()>().await;
            }
            let (outbound, packets) = mpsc::channel(64);
            let mut response = Response::new(ReceiverStream::new(packets));
            let header = |text: &str| text.parse().map_err(|_| Status::internal("not a header"));
            response.metadata_mut().insert("serverid", header(&manners.server_id)?);
            response.metadata_mut().insert("servercount", header(&manners.server_count)?);
            let inbound = request.into_inner();
            let _ = connected.send(Agent { certificate, agent_id, identifiers, inbound, outbound }).await;
            Ok(response)
        })
    }
}

/// A stream that writes a byte at a time, if it is told to.
struct Slow<S> {
    pause: Option<Duration>,
    sleep: Option<Pin<Box<Sleep>>>,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Slow<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        waker: &mut Waker<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(waker, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Slow<S> {
    fn poll_write(mut self: Pin<&mut Self>, waker: &mut Waker<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let Some(pause) = self.pause else { return Pin::new(&mut self.stream).poll_write(waker, bytes) };
        let waiting = self.sleep.get_or_insert_with(|| Box::pin(sleep(pause)));
        ready!(waiting.as_mut().poll(waker));
        self.sleep = None;
        Pin::new(&mut self.stream).poll_write(waker, bytes.get(..1).unwrap_or_default())
    }
    fn poll_flush(mut self: Pin<&mut Self>, waker: &mut Waker<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(waker)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, waker: &mut Waker<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(waker)
    }
}

/// A dial, as a packet.
pub fn dial(address: &str, random: i64) -> Packet {
    let request = DialRequest { protocol: "tcp".to_owned(), address: address.to_owned(), random };
    Packet { kind: kind::DIAL_REQ, payload: Some(Payload::DialRequest(request)) }
}

/// Bytes, as a packet.
pub fn data(connect_id: i64, data: Bytes) -> Packet {
    Packet { kind: kind::DATA, payload: Some(Payload::Data(Data { connect_id, error: String::new(), data })) }
}

/// A close, as a packet.
pub fn close(connect_id: i64) -> Packet {
    Packet { kind: kind::CLOSE_REQ, payload: Some(Payload::CloseRequest(CloseRequest { connect_id })) }
}

/// The end of a dial under way, as a packet.
pub fn close_dial(random: i64) -> Packet {
    Packet { kind: kind::DIAL_CLS, payload: Some(Payload::CloseDial(CloseDial { random })) }
}

/// Where the answer to a dial goes, and then its bytes.
type Dialling = (oneshot::Sender<Result<i64, String>>, mpsc::Sender<Bytes>);

#[derive(Default)]
struct Table {
    dialling: HashMap<i64, Dialling>,
    open: HashMap<i64, mpsc::Sender<Bytes>>,
}

/// Dials through a stream, as a well-behaved server.
pub struct Dials {
    /// Cancelled when the agent asks for no more dials.
    pub drained: CancellationToken,
    /// Cancelled when the stream ends.
    pub ended: CancellationToken,
    outbound: mpsc::Sender<Result<Packet, Status>>,
    table: Arc<Mutex<Table>>,
    next: AtomicI64,
    task: JoinHandle<()>,
}

impl Drop for Dials {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection of such a dial.
pub struct Connection {
    id: i64,
    outbound: mpsc::Sender<Result<Packet, Status>>,
    inbound: mpsc::Receiver<Bytes>,
}

impl Dials {
    /// Takes a stream over.
    pub fn new(agent: Agent) -> Dials {
        let Agent { mut inbound, outbound, .. } = agent;
        let table: Arc<Mutex<Table>> = Arc::default();
        let shared = Arc::clone(&table);
        let (drained, ended) = (CancellationToken::new(), CancellationToken::new());
        let (drain, end) = (drained.clone(), ended.clone());
        let task = tokio::spawn(async move {
            let table = || shared.lock().unwrap_or_else(PoisonError::into_inner);
            while let Ok(Some(packet)) = inbound.message().await {
                match packet.payload {
                    Some(Payload::DialResponse(DialResponse { error, connect_id, random })) => {
                        let mut table = table();
                        let Some((answer, bytes)) = table.dialling.remove(&random) else { continue };
                        if error.is_empty() {
                            table.open.insert(connect_id, bytes);
                        }
                        let _ = answer.send(if error.is_empty() { Ok(connect_id) } else { Err(error) });
                    }
                    Some(Payload::Data(Data { connect_id, data, .. })) => {
                        let to = table().open.get(&connect_id).cloned();
                        if let Some(to) = to {
                            let _ = to.send(data).await;
                        }
                    }
                    Some(Payload::CloseResponse(close)) => drop(table().open.remove(&close.connect_id)),
                    Some(Payload::Drain(_)) => drain.cancel(),
                    Some(Payload::DialRequest(_) | Payload::CloseRequest(_) | Payload::CloseDial(_)) | None => {}
                }
            }
            // Whoever waits for an answer or for bytes learns that there are none.
            *table() = Table::default();
            end.cancel();
        });
        Dials { drained, ended, outbound, table, next: AtomicI64::new(1), task }
    }

    /// Dials, and waits for the answer.
    pub async fn dial(&self, address: &str) -> Result<Connection> {
        let random = self.next.fetch_add(1, Ordering::Relaxed);
        let ((answer, answered), (bytes, inbound)) = (oneshot::channel(), mpsc::channel(64));
        self.table.lock().unwrap_or_else(PoisonError::into_inner).dialling.insert(random, (answer, bytes));
        self.outbound.send(Ok(dial(address, random))).await?;
        match answered.await.context("the stream ended")? {
            Ok(id) => Ok(Connection { id, outbound: self.outbound.clone(), inbound }),
            Err(error) => bail!("{error}"),
        }
    }
}

impl Connection {
    /// Sends bytes.
    pub async fn send(&self, bytes: Bytes) -> Result<()> {
        Ok(self.outbound.send(Ok(data(self.id, bytes))).await?)
    }

    /// The next bytes; `None` at the end.
    pub async fn receive(&mut self) -> Option<Bytes> {
        self.inbound.recv().await
    }

    /// Whether the agent has ended it.
    pub fn ended(&self) -> bool {
        self.inbound.is_closed()
    }

    /// Closes it.
    pub async fn close(self) -> Result<()> {
        Ok(self.outbound.send(Ok(close(self.id))).await?)
    }
}
