//! Owns what runs in the node and in pods: a kubelet stand-in, servers, and clients that try one thing, once or again and again.
//! Called as `nodeguard-demo helper ...`, in a namespace and in the lab's guarded cgroup: a socket belongs to the cgroup of its maker.
//! Must never end by itself, but for the clients, nor send a second packet in one attempt: what is denied is counted packet by packet.

use std::{
    convert::Infallible,
    future::pending,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, UdpSocket},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};
use tokio_stream::StreamExt;

use super::{
    attacks,
    client::{self, timed_out},
};
use crate::{
    bare::runtime,
    bench::print_line,
    certs::Tls,
    load,
    servers::{Listener, http_proxy::HttpProxy},
};

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
        ["send-first", from, to] => print_json(&exchange(&UdpSocket::bind(from)?, to.parse()?, ONCE)?),
        ["tries", how, to, patience, stop] => {
            print_line("ready")?;
            let patience = Duration::from_millis(patience.parse()?);
            print_json(&keep_on(how, to.parse()?, patience, Path::new(stop))?)
        }
        ["attack", ref words @ ..] => attacks::main(words),
        ["mptcp", address] => mptcp(address.parse()?),
        ["meet", from, to] => meet(from.parse()?, to.parse()?),
        _ => runtime()?.block_on(serve(&words)),
    }
}

async fn serve(words: &[&str]) -> Result<()> {
    match *words {
        ["kubelet", address, certificate, key] => {
            let tls = Tls { protocol: None, ..Tls::http(certificate.into(), key.into()) };
            hold(tls.serve(address.parse()?, pages()).await?).await
        }
        // Plain HTTP, as pods have it.
        ["pod", address] => {
            let serving = axum::serve(TcpListener::bind(address).await?, pages());
            print_line("ready")?;
            Ok(serving.await?)
        }
        // Connects for each connection that it takes: what it dials is dialled from where it runs.
        ["relay", to, address] => {
            let to: SocketAddr = to.parse()?;
            hold(Listener::start(address.parse()?, move |taken| relay(taken, to)).await?).await
        }
        ["http-proxy", address] => hold(HttpProxy::start(address.parse()?, &[]).await?).await,
        ["bytes", address] => hold(load::serve(address).await?).await,
        ["echo", address] => echo(address).await,
        ["hold", address] => connection(address).await,
        _ => bail!("no such helper: {}", words.join(" ")),
    }
}

/// Says that a server is there, and keeps it.
async fn hold(_server: impl Send) -> Result<()> {
    print_line("ready")?;
    pending().await
}

async fn relay(mut taken: TcpStream, to: SocketAddr) -> Result<()> {
    let mut dialled = TcpStream::connect(to).await?;
    Ok(tokio::io::copy_bidirectional(&mut taken, &mut dialled).await.map(drop)?)
}

/// What kubelet has: /healthz, a log that streams, an upgraded connection that echoes.
fn pages() -> Router {
    let router = Router::new().route("/", get("ok")).route("/healthz", get("ok"));
    router.route("/containerLogs/default/web/app", get(log)).route("/exec/default/web/app", get(exec))
}

async fn log() -> Body {
    let line = |number| async move {
        tokio::time::sleep(LOG_PAUSE).await;
        Ok::<_, Infallible>(format!("line {number}\n"))
    };
    Body::from_stream(tokio_stream::iter(0..LOG_LINES).then(line))
}

async fn exec(request: Request) -> impl IntoResponse {
    tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(TokioIo::new(hyper::upgrade::on(request).await?));
        anyhow::Ok(tokio::io::copy(&mut read, &mut write).await?)
    });
    (StatusCode::SWITCHING_PROTOCOLS, [(header::UPGRADE, "echo"), (header::CONNECTION, "upgrade")])
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
async fn connection(address: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    print_line("ready")?;
    let ended = stream.read(&mut [0; 1]).await;
    print_line(&format!("ended: {ended:?}"))?;
    pending().await
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
pub const ONCE: Duration = Duration::from_millis(400);

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
    fn of(error: std::io::Error) -> Result<Answer> {
        if error.kind() == ErrorKind::PermissionDenied {
            Ok(Answer::NotPermitted)
        } else if error.kind() == ErrorKind::ConnectionRefused {
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
    exchange(&unconnected(to)?, to, ONCE)
}

fn unconnected(to: SocketAddr) -> Result<UdpSocket> {
    Ok(UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?)
}

/// Sends a datagram from a socket that is there, and waits so long for the answer.
pub fn exchange(socket: &UdpSocket, to: SocketAddr, patience: Duration) -> Result<Answer> {
    socket.set_read_timeout(Some(patience))?;
    let mut buffer = [0; 16];
    match socket.send_to(b"hello", to).and_then(|_| socket.recv_from(&mut buffer)) {
        Ok((5, _)) => Ok(Answer::Reached),
        Ok(_) => bail!("an answer of another length"),
        Err(error) => Answer::of(error),
    }
}

/// How long to pause between two attempts: what changes meanwhile needs some of the processor too.
pub const PAUSE: Duration = Duration::from_millis(2);

/// Makes one attempt, and says whether it was answered.
pub type Attempt = fn(SocketAddr, Duration) -> bool;

/// A whole exchange: the handshake, a request, an answer.
pub fn tcp(to: SocketAddr, patience: Duration) -> bool {
    let exchange = || -> std::io::Result<()> {
        let mut stream = std::net::TcpStream::connect_timeout(&to, patience)?;
        // Closed with a RST: no port waits for the next attempt.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n")?;
        stream.read_exact(&mut [0; 12])
    };
    exchange().is_ok()
}

/// One datagram and its answer. Whatever fails but the wait for the answer ends the process: it is no denial.
#[expect(clippy::panic, reason = "an attempt that cannot be made ends the test")]
pub fn udp(to: SocketAddr, patience: Duration) -> bool {
    match unconnected(to).and_then(|socket| exchange(&socket, to, patience)) {
        Ok(Answer::Reached) => true,
        Ok(Answer::NoAnswer) => false,
        other => panic!("{other:?}"),
    }
}

/// Tries until the file `stop` exists; how many attempts were made and how many of them were answered.
fn keep_on(how: &str, to: SocketAddr, patience: Duration, stop: &Path) -> Result<[usize; 2]> {
    let attempt: Attempt = match how {
        "tcp" => tcp,
        "udp" => udp,
        _ => bail!("no such attempt: {how}"),
    };
    let [mut made, mut answered] = [0; 2];
    while !stop.exists() {
        made += 1;
        answered += usize::from(attempt(to, patience));
        std::thread::sleep(PAUSE);
    }
    Ok([made, answered])
}

fn print_json(value: &impl Serialize) -> Result<()> {
    print_line(&serde_json::to_string(value)?)
}
