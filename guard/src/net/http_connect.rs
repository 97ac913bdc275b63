//! Owns CONNECT: a TCP connection to an HTTP proxy, and the request that makes it a connection to a host.
//! Called by `tunnel/stream/establish` for each stream and by `cluster/api_server` for each request.
//! Must never send the proxy more than the host's name and the user that the proxy's own URL names.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::net::{host_port::HostPort, http_proxy::HttpProxy};

/// The time for all addresses of a proxy together.
const PATIENCE: Duration = Duration::from_secs(8);
/// The largest response head, bytes.
const HEAD: usize = 16 << 10;
/// How much of a status line an error shows.
const SHOWN: usize = 100;

/// Why there is no connection through an HTTP proxy.
#[derive(Debug, thiserror::Error)]
pub enum ConnectProxyError {
    /// No TCP connection to it.
    #[error("cannot connect to the HTTP proxy {proxy}: {error}; {HINT}")]
    Unreachable {
        /// The proxy.
        proxy: String,
        /// What is wrong.
        error: io::Error,
    },
    /// It refused.
    #[error("the HTTP proxy {proxy} refuses to connect to {host}: {status}{}; {HINT}", credentials_hint(status))]
    Refused {
        /// The proxy.
        proxy: String,
        /// The host that it was asked for.
        host: String,
        /// Its status line.
        status: String,
    },
    /// Its response is not HTTP.
    #[error("unreadable CONNECT response from HTTP proxy {proxy} ({what}); {HINT}")]
    Unreadable {
        /// The proxy.
        proxy: String,
        /// What it sent.
        what: String,
    },
}

const HINT: &str = "check that HTTPS_PROXY names an HTTP proxy, or exclude this host with NO_PROXY";

fn credentials_hint(status: &str) -> &'static str {
    if status.starts_with("407") {
        " (user and password belong in its URL: http://user:password@host:port)"
    } else {
        ""
    }
}

impl ConnectProxyError {
    fn unreadable(proxy: &HttpProxy, what: impl Into<String>) -> ConnectProxyError {
        ConnectProxyError::Unreadable { proxy: proxy.to_string(), what: what.into() }
    }
}

/// Connects to one of the addresses of a proxy.
pub(crate) async fn connect_to_proxy(proxy: &HttpProxy) -> Result<TcpStream, ConnectProxyError> {
    let failed = |error: io::Error| ConnectProxyError::Unreachable { proxy: proxy.to_string(), error };
    let deadline = Instant::now() + PATIENCE;
    let name = (proxy.at.name.as_str(), proxy.at.port);
    let addresses =
        timeout(PATIENCE, tokio::net::lookup_host(name)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()));
    let addresses: Vec<SocketAddr> = addresses.map_err(failed)?.collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no address");
    for (index, address) in addresses.iter().enumerate() {
        // An address that does not answer leaves time for the others.
        let share = deadline.saturating_duration_since(Instant::now()) / (addresses.len() - index).max(1) as u32;
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_elapsed) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failed(last))
}

/// Sends CONNECT for a host. The bytes that follow the response head stay in the reader.
pub(crate) async fn request_connect(
    stream: &mut BufReader<TcpStream>,
    proxy: &HttpProxy,
    host: &HostPort,
) -> Result<(), ConnectProxyError> {
    let authorization = proxy.authorization.iter().map(|value| format!("Proxy-Authorization: {value}\r\n"));
    let authorization: String = authorization.collect();
    let request = format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: nodeguard\r\n{authorization}\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(|error| ConnectProxyError::unreadable(proxy, error.to_string()))?;
    let mut head = stream.take(HEAD as u64);
    let (mut status, mut line) = (None, Vec::new());
    loop {
        line.clear();
        let read = head.read_until(b'\n', &mut line).await;
        read.map_err(|error| ConnectProxyError::unreadable(proxy, error.to_string()))?;
        let Some(bare) = line.strip_suffix(b"\n") else {
            return Err(ConnectProxyError::unreadable(
                proxy,
                if head.limit() == 0 { "it is too long" } else { "it hung up" },
            ));
        };
        let bare = bare.strip_suffix(b"\r").unwrap_or(bare);
        match &status {
            None => {
                let read = status_of(bare);
                status = Some(read.ok_or_else(|| ConnectProxyError::unreadable(proxy, format!("`{}`", shown(bare))))?);
            }
            Some((code, line)) if bare.is_empty() => {
                let refused = ConnectProxyError::Refused {
                    proxy: proxy.to_string(),
                    host: host.to_string(),
                    status: line.clone(),
                };
                return if (200..300).contains(code) { Ok(()) } else { Err(refused) };
            }
            Some(_) => {}
        }
    }
}

/// The code, and the code with the reason, of `HTTP/1.1 200 Connection established`.
fn status_of(line: &[u8]) -> Option<(u16, String)> {
    let rest = line.strip_prefix(b"HTTP/1.")?;
    let [b'0' | b'1', b' ', rest @ ..] = rest else { return None };
    let (code, after) = rest.split_at_checked(3)?;
    let code: u16 = std::str::from_utf8(code).ok().filter(|_| code.iter().all(u8::is_ascii_digit))?.parse().ok()?;
    (matches!(after, [] | [b' ', ..]) && (100..600).contains(&code)).then(|| (code, shown(rest)))
}

/// The bytes as an error may show them.
fn shown(bytes: &[u8]) -> String {
    let visible = |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '?' };
    bytes.iter().take(SHOWN).map(visible).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    /// What comes of a proxy that answers so, what it was asked, and what is read after it.
    async fn asked(url: &str, answer: &'static [u8]) -> (Result<(), ConnectProxyError>, String, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let proxy = HttpProxy::parse(&url.replace("PROXY", &address.to_string()), 443).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
            }
            stream.write_all(answer).await.unwrap();
            String::from_utf8(request).unwrap()
        });
        let mut stream = BufReader::new(connect_to_proxy(&proxy).await.unwrap());
        let host = HostPort::parse("[fd00::1]:8132", 1).unwrap();
        let result = request_connect(&mut stream, &proxy, &host).await;
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        (result, server.await.unwrap(), rest)
    }

    #[tokio::test]
    async fn a_proxy_is_asked_by_the_hosts_name_and_what_follows_is_kept() {
        let (result, request, rest) =
            asked("http://u:p@PROXY", b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nmore").await;
        assert!(result.is_ok());
        assert_eq!(rest, b"more");
        assert_eq!(
            request,
            "CONNECT [fd00::1]:8132 HTTP/1.1\r\nHost: [fd00::1]:8132\r\nUser-Agent: nodeguard\r\nProxy-Authorization: Basic dTpw\r\n\r\n"
        );
        let (result, request, _) = asked("PROXY", b"HTTP/1.0 200\n\n").await;
        assert!(result.is_ok());
        assert!(!request.contains("Authorization"));
    }

    #[tokio::test]
    async fn a_refusal_says_who_refused_what_and_nothing_that_could_be_more() {
        let (result, ..) = asked("http://u:secret@PROXY", b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await;
        let text = result.unwrap_err().to_string();
        assert!(text.contains("refuses to connect to [fd00::1]:8132: 407 Proxy Authentication Required"), "{text}");
        assert!(text.contains("http://user:password@") && text.contains("NO_PROXY"), "{text}");
        assert!(!text.contains("secret") && !text.contains("dTpz"), "{text}");
        let (result, ..) = asked("PROXY", b"HTTP/1.1 403 \x1b[31mno\r\n\r\n").await;
        assert!(result.unwrap_err().to_string().contains("403 ?[31mno"));
        for answer in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/2 200\r\n\r\n",
            b"SSH-2.0-x\r\n",
            b"HTTP/1.1 200OK\r\n\r\n",
            b"HTTP/1.1 +20 OK\r\n\r\n",
        ] {
            let (result, ..) = asked("PROXY", answer).await;
            assert!(matches!(result, Err(ConnectProxyError::Unreadable { .. })), "{answer:?}");
        }
        let long: &'static [u8] = Box::leak(format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(HEAD)).into_bytes().into());
        let (result, ..) = asked("PROXY", long).await;
        assert!(result.unwrap_err().to_string().contains("too long"));
    }

    #[tokio::test]
    async fn one_that_is_not_there_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = HttpProxy::parse(&listener.local_addr().unwrap().to_string(), 443).unwrap();
        drop(listener);
        let text = connect_to_proxy(&proxy).await.unwrap_err().to_string();
        assert!(text.contains("cannot connect to the HTTP proxy 127.0.0.1:"), "{text}");
    }

    proptest! {
        #[test]
        fn no_status_line_makes_it_panic(line in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = status_of(&line);
            let _ = status_of(&[&b"HTTP/1.1 "[..], &line].concat());
        }
    }
}
