//! Owns what a request asks for: its parse to host and port, and the addresses that a host means here.
//! Called by `serve`, before anything is judged.
//! Must never guess: an address in an unusual spelling is refused, because the guard and the resolver could read it differently.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use guard_policy::{node_facts::NodeFacts, refusal::Refusal};
use tokio::time::{Instant, timeout_at};

use crate::{
    cluster::services::known::{Named, Services},
    dial::failure::{Failure, LookupError},
    wire::frames::DialRequest,
};

/// The host and the port that a request asks for.
pub(crate) fn parse(request: &DialRequest) -> Result<(&str, u16), Refusal> {
    if request.protocol != "tcp" {
        return Err(Refusal::Protocol);
    }
    split(&request.address).ok_or(Refusal::Malformed)
}

/// The addresses of a host. The node's own names mean its own addresses: its resolver often says loopback.
pub(crate) async fn resolve(
    host: &str,
    port: u16,
    node: &NodeFacts,
    services: &Services,
    deadline: Instant,
) -> Result<Vec<SocketAddr>, Failure> {
    let with_port = |address: IpAddr| SocketAddr::new(address, port);
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![with_port(address)]);
    }
    if node.names.contains(&host.to_lowercase()) {
        return Ok(node.addresses.iter().copied().map(with_port).collect());
    }
    match services.named(host) {
        Named::Service(addresses) => return Ok(addresses.into_iter().map(with_port).collect()),
        Named::Unread(detail) => return Err(Failure::Refused { refusal: Refusal::ServicesUnread, detail }),
        Named::Nothing => {}
    }
    let unresolved = |cause| Failure::Unresolved { host: host.to_owned(), cause };
    match timeout_at(deadline, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(addresses)) => Ok(addresses.collect()),
        Ok(Err(error)) => {
            tracing::debug!(host, %error, "the resolver has no address");
            Err(match services.unresolved(host) {
                Some((refusal, detail)) => Failure::Refused { refusal, detail: Some(detail) },
                None => unresolved(LookupError::NoSuchHost),
            })
        }
        Err(_elapsed) => Err(unresolved(LookupError::TimedOut)),
    }
}

/// Splits `host:port` or `[v6]:port`. Strict: a zone, a named port or anything else is refused.
fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let digits = !port.starts_with('0') && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = digits.then(|| port.parse::<u16>().ok()).flatten()?;
    let letters =
        |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok().then_some(v6),
        None => (!host.is_empty() && host.len() <= 253 && letters(host) && !is_odd_v4(host)).then_some(host),
    };
    Some((host?, port))
}

/// Whether this is an IPv4 address in a spelling that only resolvers read: octal, hexadecimal, fewer than four parts.
fn is_odd_v4(host: &str) -> bool {
    let last = host.strip_suffix('.').unwrap_or(host).rsplit('.').next().unwrap_or_default();
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let hex = last.strip_prefix("0x").or(last.strip_prefix("0X"));
    let number = digits(last) || hex.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    number && host.parse::<Ipv4Addr>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_and_port_is_an_address() {
        let good = [
            ("10.0.0.1:80", ("10.0.0.1", 80)),
            ("[fd00::1]:10250", ("fd00::1", 10250)),
            ("node-1.example:1", ("node-1.example", 1)),
            ("node-1.:65535", ("node-1.", 65535)),
            ("_a.b_c:443", ("_a.b_c", 443)),
            ("10.example:80", ("10.example", 80)),
            ("[::ffff:10.0.0.1]:80", ("::ffff:10.0.0.1", 80)),
        ];
        for (text, want) in good {
            assert_eq!(split(text), Some(want), "{text}");
        }
        for text in [
            "",
            ":80",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "a:+80",
            "a:http",
            "fd00::1:80",
            "[fd00::1%eth0]:80",
            "[a]:80",
            "a b:80",
            "/run/x:1",
            "[::1]x:80",
            "a:80:90",
            "a:080",
            "a:00",
            "a: 80",
            "a:-1",
            "a:80\n",
            "a:８０",
            "ä:80",
            "a%00:80",
            "a\0:80",
            "user@a:80",
            "http://a:80",
            "unix:/run/x:1",
            "010.0.0.1:80",
            "127.1:80",
            "2130706433:80",
            "0x7f.0.0.1:80",
            "0x7f000001:80",
            "1.2.3.4.:80",
            "1.2.3.4.5:80",
            "1.2.3.256:80",
            "[10.0.0.1]:80",
            "[::1:80",
            "::1]:80",
            "[[::1]]:80",
            "[::1]:",
            "[]:80",
            "[::ffff:1.2.3.4%1]:80",
        ] {
            assert_eq!(split(text), None, "{text}");
        }
    }
}
