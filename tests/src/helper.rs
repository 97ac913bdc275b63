//! Owns what runs in the node and in pods: kubelet stand-in, pod server, a server for bytes by the megabyte, a local client.
//! Called as `nodeguard-demo helper ...`, in a namespace and in the lab's guarded cgroup: a socket belongs to the cgroup of its maker.
//! Must never end by itself but for the client.

use std::{convert::Infallible, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{Request, Response, StatusCode, body::Frame, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    client::{self, pattern, timed_out},
    http_proxy::HttpProxy,
};

type Body = BoxBody<Bytes, Infallible>;

/// How many lines the log endpoint streams, and how far apart.
pub const LOG_LINES: usize = 5;
const LOG_PAUSE: Duration = Duration::from_millis(60);

/// Runs a helper by its command line.
pub fn main(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["get", url_address, ca] = words[..] {
        let outcome = client::https(client::tcp(url_address.parse()?), "/healthz", Path::new(ca));
        return say(&serde_json::to_string(&outcome)?);
    }
    if let ["once", how, to] = words[..] {
        return say(once(how, to.parse()?)?.as_str());
    }
    if let ["send-first", from, to] = words[..] {
        return send_first(from.parse()?, to.parse()?);
    }
    if let ["mptcp", address] = words[..] {
        return mptcp(address.parse()?);
    }
    if let ["meet", from, to] = words[..] {
        return meet(from.parse()?, to.parse()?);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match words[..] {
        ["kubelet", address, certificate, key] => {
            runtime.block_on(kubelet(address.parse()?, Path::new(certificate), Path::new(key)))
        }
        ["pod", address] => runtime.block_on(pod(address.parse()?)),
        ["relay", to, address] => runtime.block_on(relay(to.parse()?, address.parse()?)),
        ["bytes", address] => runtime.block_on(byte_server(address.parse()?)),
        ["echo", address] => runtime.block_on(echo(address.parse()?)),
        ["hold", address] => runtime.block_on(hold(address.parse()?)),
        ["http-proxy", address] => runtime.block_on(async {
            let _proxy = HttpProxy::start(address.parse()?, &[]).await?;
            say("ready")?;
            std::future::pending().await
        }),
        _ => bail!("no such helper: {}", words.join(" ")),
    }
}

/// HTTPS as kubelet has it: /healthz, a log that streams, an upgraded connection that echoes.
async fn kubelet(address: SocketAddr, certificate: &Path, key: &Path) -> Result<()> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
    let (acceptor, listener) = (TlsAcceptor::from(Arc::new(config)), listen(address).await?);
    loop {
        let (stream, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let stream = acceptor.accept(stream).await?;
            serve(TokioIo::new(stream)).await
        });
    }
}

/// Plain HTTP, as pods have it.
async fn pod(address: SocketAddr) -> Result<()> {
    let listener = listen(address).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve(TokioIo::new(stream)));
    }
}

async fn serve<S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static>(stream: S) -> Result<()> {
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(stream, service_fn(answer));
    Ok(connection.with_upgrades().await?)
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>> {
    let body = |text: &'static str| Full::new(Bytes::from_static(text.as_bytes())).boxed();
    match request.uri().path() {
        "/healthz" | "/" => Ok(Response::new(body("ok"))),
        "/containerLogs/default/web/app" => Ok(Response::new(log())),
        "/exec/default/web/app" => {
            let mut response = Response::new(body(""));
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert(header::UPGRADE, header::HeaderValue::from_static("echo"));
            response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
            tokio::spawn(async move {
                let mut upgraded = TokioIo::new(hyper::upgrade::on(request).await?);
                let mut buffer = vec![0; 16 << 10];
                loop {
                    let count = upgraded.read(&mut buffer).await?;
                    if count == 0 {
                        return anyhow::Ok(());
                    }
                    upgraded.write_all(buffer.get(..count).unwrap_or_default()).await?;
                }
            });
            Ok(response)
        }
        _ => {
            let mut response = Response::new(body("not found"));
            *response.status_mut() = StatusCode::NOT_FOUND;
            Ok(response)
        }
    }
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

/// Connects to an address for each connection that it takes: what it dials is dialled from where it runs.
async fn relay(to: SocketAddr, address: SocketAddr) -> Result<()> {
    let listener = listen(address).await?;
    loop {
        let (mut taken, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut dialled = TcpStream::connect(to).await?;
            anyhow::Ok(tokio::io::copy_bidirectional(&mut taken, &mut dialled).await?)
        });
    }
}

/// Answers every datagram with itself.
async fn echo(address: SocketAddr) -> Result<()> {
    let socket = tokio::net::UdpSocket::bind(address).await.with_context(|| format!("cannot bind {address}"))?;
    say("ready")?;
    let mut buffer = [0; 2048];
    loop {
        let (count, from) = socket.recv_from(&mut buffer).await?;
        // To port 0 nothing can be sent.
        let _ = socket.send_to(buffer.get(..count).unwrap_or_default(), from).await;
    }
}

/// Connects, says so, and says when the other end or somebody else has ended it.
async fn hold(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    say("ready")?;
    let ended = stream.read(&mut [0; 1]).await;
    say(&format!("ended: {ended:?}"))?;
    std::future::pending::<Result<()>>().await
}

/// Takes connections over MPTCP and holds them.
fn mptcp(address: SocketAddr) -> Result<()> {
    let protocol = socket2::Protocol::from(262);
    let listener = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, Some(protocol))?;
    listener.bind(&address.into())?;
    listener.listen(64)?;
    say("ready")?;
    let mut held = Vec::new();
    loop {
        held.push(listener.accept()?);
    }
}

/// Connects from a given address and port, and says when it is connected.
fn meet(from: SocketAddr, to: SocketAddr) -> Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(from), socket2::Type::STREAM, None)?;
    socket.bind(&from.into())?;
    say("ready")?;
    socket.connect(&to.into())?;
    say("connected")?;
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

/// One attempt from where this runs, and how it ended.
fn once(how: &str, to: SocketAddr) -> Result<Answer> {
    let denied = |error: &std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    match how {
        "tcp" => Ok(match std::net::TcpStream::connect_timeout(&to, ONCE) {
            Ok(_) => Answer::Reached,
            Err(error) if denied(&error) => Answer::NotPermitted,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Answer::Refused,
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => Answer::NoAnswer,
            Err(error) => return Err(error.into()),
        }),
        "udp" => udp_once(to),
        _ => bail!("tcp or udp"),
    }
}

/// How long an attempt waits: in a lab an answer comes within a millisecond.
const ONCE: Duration = Duration::from_millis(400);

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    const ALL: [Answer; 4] = [Answer::Reached, Answer::Refused, Answer::NoAnswer, Answer::NotPermitted];

    fn as_str(self) -> &'static str {
        match self {
            Answer::Reached => "reached",
            Answer::Refused => "refused",
            Answer::NoAnswer => "no-answer",
            Answer::NotPermitted => "not-permitted",
        }
    }

    /// What the helper printed.
    pub fn read(text: &str) -> Option<Answer> {
        Answer::ALL.into_iter().find(|once| once.as_str() == text.trim())
    }
}

/// Sends a datagram from a socket of its own, unconnected, and waits for the answer.
pub fn udp_once(to: SocketAddr) -> Result<Answer> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    exchange(&std::net::UdpSocket::bind(any)?, to)
}

/// The same from a socket that is there.
pub fn exchange(socket: &std::net::UdpSocket, to: SocketAddr) -> Result<Answer> {
    socket.set_read_timeout(Some(ONCE))?;
    match socket.send_to(b"hello", to) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(Answer::NotPermitted),
        sent => sent?,
    };
    let mut buffer = [0; 16];
    match socket.recv_from(&mut buffer) {
        Ok((5, _)) => Ok(Answer::Reached),
        Ok(_) => bail!("an answer of another length"),
        Err(error) if timed_out(&error) => Ok(Answer::NoAnswer),
        Err(error) => Err(error.into()),
    }
}

/// Opens a conversation from a given port, then answers as the socket's owner would: what is still let in was asked for.
fn send_first(from: SocketAddr, to: SocketAddr) -> Result<()> {
    say(exchange(&std::net::UdpSocket::bind(from)?, to)?.as_str())
}

/// `GET N SEED`: sends N bytes of the pattern and closes right behind them. `PUT SEED ID`: reads to the end; `SUM ID` says what was read.
async fn byte_server(address: SocketAddr) -> Result<()> {
    let listener = listen(address).await?;
    let sums: Arc<tokio::sync::Mutex<std::collections::HashMap<String, String>>> = Arc::default();
    loop {
        let (stream, _) = listener.accept().await?;
        let sums = Arc::clone(&sums);
        tokio::spawn(async move { bytes_of(stream, &sums).await });
    }
}

async fn bytes_of(
    mut stream: TcpStream,
    sums: &tokio::sync::Mutex<std::collections::HashMap<String, String>>,
) -> Result<()> {
    let (read, mut write) = stream.split();
    let mut read = BufReader::with_capacity(64 << 10, read);
    let mut line = String::new();
    read.read_line(&mut line).await?;
    match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["GET", count, seed] => {
            let bytes = pattern(seed.parse()?, count.parse()?);
            write.write_all(&bytes).await?;
            write.shutdown().await?;
        }
        ["PUT", id] => {
            let mut digest = client::Digest::default();
            let mut buffer = vec![0; 64 << 10];
            let said = loop {
                match read.read(&mut buffer).await {
                    Ok(0) => break digest.finish(),
                    Ok(count) => digest.update(buffer.get(..count).unwrap_or_default()),
                    Err(error) => break format!("error {error}"),
                }
            };
            sums.lock().await.insert(id.to_owned(), said);
        }
        ["SUM", id] => {
            let said = sums.lock().await.remove(id).unwrap_or_else(|| "none".to_owned());
            write.write_all(format!("{said}\n").as_bytes()).await?;
        }
        _ => bail!("no such request: {line}"),
    }
    Ok(())
}

async fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    say("ready")?;
    Ok(listener)
}

fn say(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
