//! Owns what runs in the node and in pods: a kubelet stand-in, servers, and clients that try one thing.
//! Called as `nodeguard-demo helper ...`, in a namespace and in the lab's guarded cgroup: a socket belongs to the cgroup of its maker.
//! Must never end by itself, but for the clients.

use std::{convert::Infallible, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    header,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use super::{
    attacks,
    client::{self, timed_out},
    tries,
};
use crate::{bench::print_line, endpoint, servers::http_proxy::HttpProxy};

type Body = BoxBody<Bytes, Infallible>;

/// How many lines the log endpoint streams, and how far apart.
pub const LOG_LINES: usize = 5;
const LOG_PAUSE: Duration = Duration::from_millis(60);

/// Runs a helper by its command line.
pub fn main(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["get", address, ca] => print_json(&client::https(client::tcp(address.parse()?), "/healthz", Path::new(ca))),
        ["once", "tcp", to] => print_json(&tcp_once(to.parse()?)?),
        ["once", "udp", to] => print_json(&udp_once(to.parse()?)?),
        // From a given port, as the socket's owner: what comes back was asked for.
        ["send-first", from, to] => print_json(&exchange(&std::net::UdpSocket::bind(from)?, to.parse()?)?),
        ["tries", how, to, patience, stop] => {
            print_line("ready")?;
            let patience = Duration::from_millis(patience.parse()?);
            print_json(&tries::keep_on(how, to.parse()?, patience, Path::new(stop))?)
        }
        ["attack", ref words @ ..] => attacks::main(words),
        ["mptcp", address] => mptcp(address.parse()?),
        ["meet", from, to] => meet(from.parse()?, to.parse()?),
        _ => {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(serve(&words))
        }
    }
}

async fn serve(words: &[&str]) -> Result<()> {
    match *words {
        ["kubelet", address, certificate, key] => kubelet(address, Path::new(certificate), Path::new(key)).await,
        // Plain HTTP, as pods have it.
        ["pod", address] => each(address, |stream| http(TokioIo::new(stream))).await,
        // Connects for each connection that it takes: what it dials is dialled from where it runs.
        ["relay", to, address] => {
            let to: SocketAddr = to.parse()?;
            each(address, |taken| relay(taken, to)).await
        }
        ["bytes", address] => endpoint::serve(listen(address).await?).await,
        ["echo", address] => echo(address).await,
        ["hold", address] => hold(address).await,
        ["http-proxy", address] => {
            let _proxy = HttpProxy::start(address.parse()?, &[]).await?;
            print_line("ready")?;
            std::future::pending().await
        }
        _ => bail!("no such helper: {}", words.join(" ")),
    }
}

async fn relay(mut taken: TcpStream, to: SocketAddr) -> Result<()> {
    let mut dialled = TcpStream::connect(to).await?;
    Ok(tokio::io::copy_bidirectional(&mut taken, &mut dialled).await.map(drop)?)
}

async fn listen(address: &str) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    print_line("ready")?;
    Ok(listener)
}

/// Serves each connection to an address by itself.
async fn each<F: Future<Output = Result<()>> + Send + 'static>(
    address: &str,
    serve: impl Fn(TcpStream) -> F,
) -> Result<()> {
    let listener = listen(address).await?;
    loop {
        tokio::spawn(serve(listener.accept().await?.0));
    }
}

/// HTTPS as kubelet has it: /healthz, a log that streams, an upgraded connection that echoes.
async fn kubelet(address: &str, certificate: &Path, key: &Path) -> Result<()> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    each(address, move |stream| {
        let acceptor = acceptor.clone();
        async move { http(TokioIo::new(acceptor.accept(stream).await?)).await }
    })
    .await
}

async fn http<S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static>(stream: S) -> Result<()> {
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(stream, service_fn(answer));
    Ok(connection.with_upgrades().await?)
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>> {
    let body = |text: &'static str| Full::new(Bytes::from_static(text.as_bytes())).boxed();
    let response = Response::builder();
    Ok(match request.uri().path() {
        "/healthz" | "/" => response.body(body("ok"))?,
        "/containerLogs/default/web/app" => response.body(log())?,
        "/exec/default/web/app" => {
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(TokioIo::new(hyper::upgrade::on(request).await?));
                anyhow::Ok(tokio::io::copy(&mut read, &mut write).await?)
            });
            let response = response.status(StatusCode::SWITCHING_PROTOCOLS);
            response.header(header::UPGRADE, "echo").header(header::CONNECTION, "upgrade").body(body(""))?
        }
        _ => response.status(StatusCode::NOT_FOUND).body(body("not found"))?,
    })
}

fn log() -> Body {
    let (sender, lines) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        for number in 0..LOG_LINES {
            let line = Bytes::from(format!("line {number}\n"));
            if sender.send(Ok::<_, Infallible>(Frame::data(line))).await.is_err() {
                return;
            }
            tokio::time::sleep(LOG_PAUSE).await;
        }
    });
    BodyExt::boxed(StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(lines)))
}

/// Answers every datagram with itself.
async fn echo(address: &str) -> Result<()> {
    let socket = tokio::net::UdpSocket::bind(address).await.with_context(|| format!("cannot bind {address}"))?;
    print_line("ready")?;
    let mut buffer = [0; 2048];
    loop {
        let (count, from) = socket.recv_from(&mut buffer).await?;
        // To port 0 nothing can be sent.
        let _ = socket.send_to(buffer.get(..count).unwrap_or_default(), from).await;
    }
}

/// Connects, says so, and says when the other end or somebody else has ended it.
async fn hold(address: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    print_line("ready")?;
    let ended = stream.read(&mut [0; 1]).await;
    print_line(&format!("ended: {ended:?}"))?;
    std::future::pending::<Result<()>>().await
}

/// Takes connections over MPTCP and holds them.
fn mptcp(address: SocketAddr) -> Result<()> {
    let listener = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::MPTCP))?;
    listener.bind(&address.into())?;
    listener.listen(64)?;
    print_line("ready")?;
    let mut held = Vec::new();
    loop {
        held.push(listener.accept()?);
    }
}

/// Connects from a given address and port, and says when it is connected.
fn meet(from: SocketAddr, to: SocketAddr) -> Result<()> {
    let socket = Socket::new(Domain::for_address(from), Type::STREAM, None)?;
    socket.bind(&from.into())?;
    print_line("ready")?;
    socket.connect(&to.into())?;
    print_line("connected")?;
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

/// How long an attempt waits: in a lab an answer comes within a millisecond.
const ONCE: Duration = Duration::from_millis(400);

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// A SYN-ACK, or an answer to the datagram.
    Reached,
    /// A RST.
    Refused,
    /// Nothing.
    NoAnswer,
    /// EPERM: not even sent.
    NotPermitted,
}

impl Answer {
    /// What an error of a socket says; an error itself where it says nothing of the kind.
    fn of(error: io::Error) -> Result<Answer> {
        if error.kind() == io::ErrorKind::PermissionDenied {
            Ok(Answer::NotPermitted)
        } else if error.kind() == io::ErrorKind::ConnectionRefused {
            Ok(Answer::Refused)
        } else if timed_out(&error) {
            Ok(Answer::NoAnswer)
        } else {
            Err(error.into())
        }
    }
}

/// Connects once.
fn tcp_once(to: SocketAddr) -> Result<Answer> {
    std::net::TcpStream::connect_timeout(&to, ONCE).map_or_else(Answer::of, |_| Ok(Answer::Reached))
}

/// Sends a datagram from a socket of its own, unconnected, and waits for the answer.
pub fn udp_once(to: SocketAddr) -> Result<Answer> {
    exchange(&std::net::UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?, to)
}

/// The same from a socket that is there.
pub fn exchange(socket: &std::net::UdpSocket, to: SocketAddr) -> Result<Answer> {
    socket.set_read_timeout(Some(ONCE))?;
    let mut buffer = [0; 16];
    match socket.send_to(b"hello", to).and_then(|_| socket.recv_from(&mut buffer)) {
        Ok((5, _)) => Ok(Answer::Reached),
        Ok(_) => bail!("an answer of another length"),
        Err(error) => Answer::of(error),
    }
}

fn print_json(value: &impl Serialize) -> Result<()> {
    print_line(&serde_json::to_string(value)?)
}
