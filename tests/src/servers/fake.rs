//! Owns a server of the agent protocol in Rust, for what the real one never does: as fast as possible, or hostile.
//! Called by the tunnel bench, which measures our own limit, and by tests.
//! Must never stand in for the real server where that can do the job.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
pub use nodeguard::wire::frames::data;
use nodeguard::{
    tunnel::stream::{
        batch::{Batched, GATHERED},
        establish::READ_AHEAD,
    },
    wire::frames::{CloseDial, CloseRequest, Data, DialRequest, DialResponse, Packet, Payload},
};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream},
    net::TcpStream,
    sync::{Notify, mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{either::Either, sync::CancellationToken};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::Listener;
use crate::{
    bare::{Place, SERVER},
    certs::{Certs, Tls},
    lock,
};

/// How a server behaves before any packet.
#[derive(Clone, Debug)]
pub struct Manners {
    /// What it calls itself.
    pub server_id: &'static str,
    /// How many servers it claims there are.
    pub server_count: &'static str,
    /// Whether it ever sends its headers.
    pub answers: bool,
    /// How long it waits before each byte that it sends, once TLS is up.
    pub pause: Option<Duration>,
}

impl Default for Manners {
    fn default() -> Manners {
        Manners { server_id: "fake", server_count: "1", answers: true, pause: None }
    }
}

type Outbound = mpsc::Sender<Result<Packet, Status>>;

/// A stream that an agent opened.
pub struct Agent {
    /// The certificate that it showed.
    pub certificate: Option<CertificateDer<'static>>,
    /// From the agent.
    pub inbound: Streaming<Packet>,
    /// To the agent.
    pub outbound: Outbound,
}

impl Agent {
    /// Waits for the answer to a dial: the connection's id, or the error.
    pub async fn answer(&mut self, random: i64) -> Result<Result<i64, String>> {
        loop {
            let packet = timeout(Duration::from_secs(10), self.inbound.message()).await.context("no answer")??;
            if let Some(Payload::DialResponse(answer)) = packet.context("the stream ended")?.payload
                && answer.random == random
            {
                return Ok(if answer.error.is_empty() { Ok(answer.connect_id) } else { Err(answer.error) });
            }
        }
    }

    /// Dials, and waits for the connection's id.
    pub async fn open(&mut self, address: &str, random: i64) -> Result<i64> {
        self.outbound.send(Ok(dial(address, random))).await?;
        self.answer(random).await?.map_err(anyhow::Error::msg)
    }
}

/// A running server; it ends when this is dropped.
pub struct Fake {
    server: Server,
    agents: mpsc::Receiver<Agent>,
    _listener: Listener,
}

impl Fake {
    /// Listens at the lab's address with the lab's server certificate, and asks agents for theirs.
    pub async fn start(place: &Place, port: u16, manners: Manners) -> Result<Fake> {
        let (connected, agents) = mpsc::channel(64);
        let tls = Arc::new(Mutex::new(acceptor(&place.certs)?));
        let server = Server { tls, manners, connected, goaway: Arc::default(), accepted: Arc::default() };
        let serving = server.clone();
        let at = SocketAddr::new(SERVER.parse()?, port);
        let _listener = Listener::start(at, move |tcp| serving.clone().serve(tcp)).await?;
        Ok(Fake { server, agents, _listener })
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> usize {
        self.server.accepted.load(Ordering::Relaxed)
    }

    /// Reads the certificates again; they are used from the next connection on.
    pub fn renew(&self, certs: &Certs) -> Result<()> {
        *lock(&self.server.tls) = acceptor(certs)?;
        Ok(())
    }

    /// Sends GOAWAY to every agent, and serves what is open.
    pub fn go_away(&self) {
        self.server.goaway.notify_waiters();
    }

    /// Waits for the next stream that an agent opens.
    pub async fn agent(&mut self) -> Result<Agent> {
        let next = timeout(Duration::from_secs(30), self.agents.recv()).await.context("no stream within 30 s")?;
        next.context("the fake server has ended")
    }

    /// Waits for the next stream, to dial through it as a well-behaved server.
    pub async fn dials(&mut self) -> Result<Dials> {
        Ok(Dials::new(self.agent().await?))
    }
}

fn acceptor(certs: &Certs) -> Result<TlsAcceptor> {
    Tls { clients: Some(certs.path("ca.crt")), protocol: Some("h2"), ..Tls::server(certs) }.acceptor()
}

/// What every connection is served with.
#[derive(Clone)]
struct Server {
    tls: Arc<Mutex<TlsAcceptor>>,
    manners: Manners,
    connected: mpsc::Sender<Agent>,
    goaway: Arc<Notify>,
    accepted: Arc<AtomicUsize>,
}

impl Server {
    async fn serve(self, tcp: TcpStream) -> Result<()> {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        tcp.set_nodelay(true)?;
        let acceptor = lock(&self.tls).clone();
        let mut tls = acceptor.accept(BufReader::with_capacity(READ_AHEAD, tcp)).await?;
        tls.get_mut().1.set_buffer_limit(Some(GATHERED));
        let shown = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let certificate = shown.map(|certificate| certificate.clone().into_owned());
        // As cheap as possible: what it costs is taken from the agents that are measured under it.
        let stream = match self.manners.pause {
            None => Either::Left(Batched::new(tls)),
            Some(pause) => Either::Right(byte_by_byte(tls, pause)),
        };
        let goaway = Arc::clone(&self.goaway);
        let connect = tower::service_fn(move |request| self.clone().connect(certificate.clone(), request));
        let service = service_fn(move |request| {
            let connect = connect.clone();
            async move {
                let codec: ProstCodec<Packet, Packet> = ProstCodec::default();
                Ok::<_, Infallible>(tonic::server::Grpc::new(codec).streaming(connect, request).await)
            }
        });
        let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        server.initial_stream_window_size(4 << 20).initial_connection_window_size(8 << 20);
        let mut serving = std::pin::pin!(server.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            served = &mut serving => return Ok(served?),
            () = goaway.notified() => serving.as_mut().graceful_shutdown(),
        }
        Ok(serving.await?)
    }

    /// `/AgentService/Connect`.
    async fn connect(
        self,
        certificate: Option<CertificateDer<'static>>,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<ReceiverStream<Result<Packet, Status>>>, Status> {
        if !self.manners.answers {
            std::future::pending::<()>().await;
        }
        let (outbound, packets) = mpsc::channel(64);
        let mut response = Response::new(ReceiverStream::new(packets));
        let header = |text: &'static str| text.parse().map_err(|_| Status::internal("not a header"));
        response.metadata_mut().insert("serverid", header(self.manners.server_id)?);
        response.metadata_mut().insert("servercount", header(self.manners.server_count)?);
        let _ = self.connected.send(Agent { certificate, inbound: request.into_inner(), outbound }).await;
        Ok(response)
    }
}

/// A stream that waits before each byte that it writes.
fn byte_by_byte(stream: impl AsyncRead + AsyncWrite + Send + 'static, pause: Duration) -> DuplexStream {
    let (near, far) = tokio::io::duplex(READ_AHEAD);
    tokio::spawn(async move {
        let ((mut said, mut answer), (mut inbound, mut outbound)) = (tokio::io::split(far), tokio::io::split(stream));
        let slowly = async {
            loop {
                let byte = said.read_u8().await?;
                tokio::time::sleep(pause).await;
                outbound.write_u8(byte).await?;
                outbound.flush().await?;
            }
        };
        tokio::select! {
            slowly = slowly => slowly,
            read = tokio::io::copy(&mut inbound, &mut answer) => read.map(drop),
        }
    });
    near
}

/// A packet that asks for a dial.
pub fn dial(address: &str, random: i64) -> Packet {
    let request = DialRequest { protocol: "tcp".to_owned(), address: address.to_owned(), random };
    Packet { kind: 0, payload: Some(Payload::DialRequest(request)) }
}

/// A packet that closes a connection.
pub fn close(connect_id: i64) -> Packet {
    Packet { kind: 2, payload: Some(Payload::CloseRequest(CloseRequest { connect_id })) }
}

/// A packet that takes back a dial under way.
pub fn close_dial(random: i64) -> Packet {
    Packet { kind: 5, payload: Some(Payload::CloseDial(CloseDial { random })) }
}

#[derive(Default)]
struct Table {
    /// Where the answer to a dial goes.
    dialling: HashMap<i64, oneshot::Sender<Result<Connection, String>>>,
    /// Where the bytes of a connection go.
    open: HashMap<i64, mpsc::Sender<Bytes>>,
}

/// Dials through a stream, as a well-behaved server.
pub struct Dials {
    /// Cancelled when the agent asks for no more dials.
    pub drained: CancellationToken,
    /// Cancelled when the stream ends.
    pub ended: CancellationToken,
    outbound: Outbound,
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
    outbound: Outbound,
    inbound: mpsc::Receiver<Bytes>,
}

impl Dials {
    /// Takes a stream over.
    pub fn new(agent: Agent) -> Dials {
        let Agent { mut inbound, outbound, .. } = agent;
        let table: Arc<Mutex<Table>> = Arc::default();
        let shared = Arc::clone(&table);
        let (drained, ended) = (CancellationToken::new(), CancellationToken::new());
        let (drain, end, to_agent) = (drained.clone(), ended.clone(), outbound.clone());
        let task = tokio::spawn(async move {
            while let Ok(Some(packet)) = inbound.message().await {
                match packet.payload {
                    Some(Payload::DialResponse(DialResponse { error, connect_id, random })) => {
                        let mut table = lock(&shared);
                        let Some(answer) = table.dialling.remove(&random) else { continue };
                        let _ = answer.send(if error.is_empty() {
                            let (bytes, inbound) = mpsc::channel(64);
                            table.open.insert(connect_id, bytes);
                            Ok(Connection { id: connect_id, outbound: to_agent.clone(), inbound })
                        } else {
                            Err(error)
                        });
                    }
                    Some(Payload::Data(Data { connect_id, data, .. })) => {
                        let to = lock(&shared).open.get(&connect_id).cloned();
                        if let Some(to) = to {
                            let _ = to.send(data).await;
                        }
                    }
                    Some(Payload::CloseResponse(close)) => drop(lock(&shared).open.remove(&close.connect_id)),
                    Some(Payload::Drain(_)) => drain.cancel(),
                    Some(Payload::DialRequest(_) | Payload::CloseRequest(_) | Payload::CloseDial(_)) | None => {}
                }
            }
            // Whoever waits for an answer or for bytes learns that there are none.
            *lock(&shared) = Table::default();
            end.cancel();
        });
        Dials { drained, ended, outbound, table, next: AtomicI64::new(1), task }
    }

    /// Dials, and waits for the answer.
    pub async fn dial(&self, address: &str) -> Result<Connection> {
        let random = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        lock(&self.table).dialling.insert(random, answer);
        self.outbound.send(Ok(dial(address, random))).await?;
        answered.await.context("the stream ended")?.map_err(anyhow::Error::msg)
    }

    /// Waits until the agent asks for no more dials.
    pub async fn drains(&self, patience: Duration) -> Result<()> {
        timeout(patience, self.drained.cancelled()).await.context("no DRAIN in time")
    }

    /// Waits until the stream ends.
    pub async fn ends(&self) -> Result<()> {
        timeout(Duration::from_secs(5), self.ended.cancelled()).await.context("an idle stream stays")
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

    /// Asks the endpoint for so many bytes and waits until they are there.
    pub async fn fetch(&mut self, count: usize) -> Result<()> {
        self.send(Bytes::from(format!("SOURCE {count}\n"))).await?;
        let mut got = 0;
        let fetched = async {
            while got < count {
                got += self.receive().await.context("the connection was cut")?.len();
            }
            Ok(())
        };
        timeout(Duration::from_secs(10), fetched).await.context("no answer")?
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
