//! Owns attempts: direct ones from a namespace, ones through the proxy-server, and what became of them.
//! Called by `attempts` and by tests.
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
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};
use serde::{Deserialize, Serialize};

use crate::{certs::roots, server::ProxyServer};

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

/// Whether nothing came in time: a socket's time-out may be told as either.
pub fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// A TCP connection from where this thread stands.
pub fn tcp(address: SocketAddr) -> Result<Box<dyn Stream>, Outcome> {
    let failed =
        |error: io::Error| if timed_out(&error) { Outcome::NoAnswer } else { Outcome::Error(error.to_string()) };
    let stream = TcpStream::connect_timeout(&address, SYN_ACK).map_err(failed)?;
    bounded(&stream).map_err(|error| Outcome::Error(error.to_string()))?;
    Ok(Box::new(stream))
}

fn bounded(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.set_nodelay(true)
}

/// A connection through the proxy-server, as the API server makes it.
pub fn through(server: &ProxyServer, destination: &str) -> Result<Box<dyn Stream>, Outcome> {
    connect(&server.socket, destination)
}

/// The same by the socket of the proxy-server's frontend.
pub fn connect(socket: &Path, destination: &str) -> Result<Box<dyn Stream>, Outcome> {
    let connect = || -> Result<Result<Box<dyn Stream>, Outcome>> {
        let mut stream = UnixStream::connect(socket).context("the proxy-server's socket")?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_write_timeout(Some(Duration::from_secs(20)))?;
        write!(stream, "CONNECT {destination} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")?;
        // Byte by byte: what follows the head belongs to the connection.
        let (mut head, mut byte) = (Vec::new(), [0; 1]);
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let code: u16 = head
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("no HTTP answer: {head:?}"))?;
        if code == 200 {
            return Ok(Ok(Box::new(stream)));
        }
        let mut body = Vec::new();
        let length = head
            .to_ascii_lowercase()
            .lines()
            .find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<u64>().ok());
        let _ = (&mut stream).take(length.unwrap_or(4096)).read_to_end(&mut body);
        Ok(Err(Outcome::NotConnected(code, String::from_utf8_lossy(&body).trim().to_owned())))
    };
    connect().unwrap_or_else(|error| Err(Outcome::Error(format!("{error:#}"))))
}

/// Knocks at a port from a namespace, so many times and by so many at once; how many were let in. `made` counts as it goes.
pub fn knock(namespace: File, to: SocketAddr, count: usize, made: &AtomicUsize) -> Result<usize> {
    /// In a lab a SYN-ACK comes within a millisecond.
    const PATIENCE: Duration = Duration::from_millis(200);
    const AT_ONCE: usize = 50;
    let admitted = AtomicUsize::new(0);
    let one_by_one = || {
        while made.fetch_add(1, Ordering::Relaxed) < count {
            if TcpStream::connect_timeout(&to, PATIENCE).is_ok() {
                admitted.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let all = || -> Result<()> {
        // Threads that are started here stand in the same namespace.
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        std::thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(one_by_one))));
        Ok(())
    };
    std::thread::scope(|scope| scope.spawn(all).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(admitted.into_inner())
}

/// A GET over TLS; the certificate is checked against the lab's CA.
pub fn https(stream: Result<Box<dyn Stream>, Outcome>, path: &str, ca: &Path) -> Outcome {
    let attempt = |stream| -> Result<Outcome> { get(&mut tls(stream, ca)?, path) };
    stream.map_or_else(
        |outcome| outcome,
        |stream| attempt(stream).unwrap_or_else(|error| Outcome::Error(format!("{error:#}"))),
    )
}

/// A GET in plain text.
pub fn http(stream: Result<Box<dyn Stream>, Outcome>, path: &str) -> Outcome {
    stream.map_or_else(
        |outcome| outcome,
        |mut stream| get(&mut stream, path).unwrap_or_else(|error| Outcome::Error(format!("{error:#}"))),
    )
}

/// TLS on a stream, the server being `node`.
pub fn tls(stream: Box<dyn Stream>, ca: &Path) -> Result<StreamOwned<ClientConnection, Box<dyn Stream>>> {
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(ca)?)
        .with_no_client_auth();
    Ok(StreamOwned::new(ClientConnection::new(Arc::new(config), ServerName::try_from("node")?)?, stream))
}

fn get(stream: &mut impl Stream, path: &str) -> Result<Outcome> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    read_all(stream, &mut answer)?;
    let text = String::from_utf8_lossy(&answer);
    let code = text
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("no HTTP answer: {text:?}"))?;
    Ok(Outcome::Http(code))
}

/// Reads to the end; many servers close without TLS's own goodbye.
fn read_all(stream: &mut impl Read, into: &mut Vec<u8>) -> io::Result<()> {
    match stream.read_to_end(into) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        other => other.map(drop),
    }
}

/// Follows the log through a stream; how many lines came, and over how long.
pub fn follow_log(stream: Box<dyn Stream>, ca: &Path) -> Result<(usize, Duration)> {
    let mut stream = tls(stream, ca)?;
    write!(stream, "GET /containerLogs/default/web/app HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let (mut text, mut buffer, mut first, mut last) = (String::new(), [0; 4096], None, Instant::now());
    loop {
        let count = match stream.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
            other => other?,
        };
        if count == 0 {
            return Ok((text.matches("line ").count(), first.map_or(Duration::ZERO, |first| last - first)));
        }
        text.push_str(&String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()));
        if text.contains("line ") {
            last = Instant::now();
            first.get_or_insert(last);
        }
    }
}

/// Upgrades and sends bytes back and forth; how many came back as they were.
pub fn upgraded_echo(stream: Box<dyn Stream>, ca: &Path) -> Result<usize> {
    let mut stream = tls(stream, ca)?;
    write!(stream, "GET /exec/default/web/app HTTP/1.1\r\nHost: node\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")?;
    let (mut head, mut byte) = (Vec::new(), [0; 1]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    ensure!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
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

/// Bytes that look random and are the same for the same seed (xorshift64*).
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// How many bytes, and their SHA-256.
pub struct Digest {
    count: u64,
    sum: aws_lc_rs::digest::Context,
}

impl Default for Digest {
    fn default() -> Digest {
        Digest { count: 0, sum: aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256) }
    }
}

impl Digest {
    /// More bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.count += bytes.len() as u64;
        self.sum.update(bytes);
    }

    /// In words.
    pub fn finish(self) -> String {
        let sum: String = self.sum.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{} {sum}", self.count)
    }
}
