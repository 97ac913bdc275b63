//! Owns attempts: direct ones from a namespace, ones through the proxy-server, and what became of them.
//! Called by the main job and by tests.
//! Must never wait without a bound: a dropped SYN is the ordinary case here.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};
use serde::{Deserialize, Serialize};

use super::net::inside;
use crate::{certs::client, servers::proxy_server::ProxyServer};

/// How long a direct attempt waits for a SYN-ACK: in a lab one comes within a millisecond.
const SYN_ACK: Duration = Duration::from_millis(600);

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// An HTTP answer.
    Http(u16),
    /// No SYN-ACK and no RST: dropped.
    NoAnswer,
    /// The proxy-server answered CONNECT with this.
    NotConnected(u16, String),
    /// Anything else.
    Error(String),
}

/// What can be read and written within bounds.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// Whether nothing came in time: a socket reports its time-out as either.
pub fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

impl From<io::Error> for Outcome {
    fn from(error: io::Error) -> Outcome {
        if timed_out(&error) { Outcome::NoAnswer } else { Outcome::Error(error.to_string()) }
    }
}

impl From<anyhow::Error> for Outcome {
    fn from(error: anyhow::Error) -> Outcome {
        Outcome::Error(format!("{error:#}"))
    }
}

/// A TCP connection from the network namespace of this thread.
pub fn tcp(address: SocketAddr) -> Result<Box<dyn Stream>, Outcome> {
    let stream = TcpStream::connect_timeout(&address, SYN_ACK)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}

/// A connection through the proxy-server, as the API server makes it.
pub fn through(server: &ProxyServer, destination: &str) -> Result<Box<dyn Stream>, Outcome> {
    let mut stream = UnixStream::connect(&server.socket).context("the proxy-server's socket")?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    let asked = write!(stream, "CONNECT {destination} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    asked.context("cannot send CONNECT")?;
    let head = read_until(&mut stream, HEAD)?;
    let code = status_code(&head)?;
    if code == 200 {
        return Ok(Box::new(stream));
    }
    let mut body = Vec::new();
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    let _ = (&mut stream).take(length.unwrap_or(4096)).read_to_end(&mut body);
    Err(Outcome::NotConnected(code, String::from_utf8_lossy(&body).trim().to_owned()))
}

/// How the head of an HTTP message ends.
const HEAD: &[u8] = b"\r\n\r\n";

/// Reads until these bytes came, or to the end, byte by byte: what follows belongs to somebody else.
pub fn read_until(stream: &mut impl Read, end: &[u8]) -> Result<String> {
    let (mut said, mut byte) = (Vec::new(), [0; 1]);
    while !said.ends_with(end) && stream.read(&mut byte)? == 1 {
        said.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

fn status_code(answer: &str) -> Result<u16> {
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    code.with_context(|| format!("no HTTP answer: {answer:?}"))
}

/// Connects to a port from a namespace, so many times and fifty at once; how many were let in. `made` counts as it goes.
pub fn knock(namespace: File, to: SocketAddr, count: usize, made: &AtomicUsize) -> Result<usize> {
    /// In a lab a SYN-ACK comes within a millisecond.
    const PATIENCE: Duration = Duration::from_millis(200);
    let admitted = AtomicUsize::new(0);
    let one_by_one = || {
        while made.fetch_add(1, Ordering::Relaxed) < count {
            if TcpStream::connect_timeout(&to, PATIENCE).is_ok() {
                admitted.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    inside(&namespace, || {
        std::thread::scope(|scope| (0..50).for_each(|_| drop(scope.spawn(one_by_one))));
        Ok(())
    })?;
    Ok(admitted.into_inner())
}

/// A GET over TLS; the certificate is checked against the lab's CA.
pub fn https(stream: Result<Box<dyn Stream>, Outcome>, path: &str, ca: &Path) -> Outcome {
    let attempt = || Ok(get(&mut tls(stream?, ca)?, path)?);
    attempt().unwrap_or_else(|outcome: Outcome| outcome)
}

/// A GET in plain text.
pub fn http(stream: Result<Box<dyn Stream>, Outcome>, path: &str) -> Outcome {
    let attempt = || Ok(get(&mut stream?, path)?);
    attempt().unwrap_or_else(|outcome: Outcome| outcome)
}

/// TLS on a stream, the server being `node`.
pub fn tls(stream: Box<dyn Stream>, ca: &Path) -> Result<TlsStream> {
    tls_to(stream, client(ca, None, None)?, "node")
}

/// TLS on a stream.
pub type TlsStream = StreamOwned<ClientConnection, Box<dyn Stream>>;

/// The same by any configuration, to any server.
pub fn tls_to(stream: Box<dyn Stream>, config: Arc<ClientConfig>, server: &'static str) -> Result<TlsStream> {
    Ok(StreamOwned::new(ClientConnection::new(config, ServerName::try_from(server)?)?, stream))
}

fn get(stream: &mut impl Stream, path: &str) -> Result<Outcome> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    while read_some(stream, &mut answer)? > 0 {}
    Ok(Outcome::Http(status_code(&String::from_utf8_lossy(&answer))?))
}

/// Reads what comes next; how much, 0 at the end. Many servers close without TLS's own goodbye.
fn read_some(stream: &mut impl Read, into: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 4096];
    let count = match stream.read(&mut buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
        other => other?,
    };
    into.extend_from_slice(buffer.get(..count).unwrap_or_default());
    Ok(count)
}

/// Follows the log through a stream; how many lines came, and over how long.
pub fn follow_log(stream: Box<dyn Stream>, ca: &Path) -> Result<(usize, Duration)> {
    let mut stream = tls(stream, ca)?;
    write!(stream, "GET /containerLogs/default/web/app HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let (mut bytes, mut first, mut last) = (Vec::new(), None, Instant::now());
    let lines = |bytes: &[u8]| String::from_utf8_lossy(bytes).matches("line ").count();
    while read_some(&mut stream, &mut bytes)? > 0 {
        if lines(&bytes) > 0 {
            last = Instant::now();
            first.get_or_insert(last);
        }
    }
    Ok((lines(&bytes), first.map_or(Duration::ZERO, |first| last - first)))
}

/// Upgrades and sends bytes back and forth; how many came back as they were.
pub fn upgraded_echo(stream: Box<dyn Stream>, ca: &Path) -> Result<usize> {
    let mut stream = tls(stream, ca)?;
    write!(stream, "GET /exec/default/web/app HTTP/1.1\r\nHost: node\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")?;
    let head = read_until(&mut stream, HEAD)?;
    ensure!(head.starts_with("HTTP/1.1 101"), "{head}");
    let mut total = 0;
    for (round, size) in [1, 1000, 60_000, 7].into_iter().enumerate() {
        let (sent, mut got) = (pattern(round as u64, size), vec![0; size]);
        stream.write_all(&sent)?;
        stream.flush()?;
        stream.read_exact(&mut got)?;
        ensure!(sent == got, "the echo differs in round {round}");
        total += size;
    }
    Ok(total)
}

/// Bytes that look random and are the same for the same seed.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// The SHA-256 of bytes, in hexadecimal.
pub fn sum(bytes: &[u8]) -> String {
    let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
