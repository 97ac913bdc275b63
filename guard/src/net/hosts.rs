//! Owns how proxy-servers are named: hosts with ports, and the places that each stands for.
//! Called by `config` (what was asked for) and by `run` (what that resolves to).
//! Must never take more addresses than a set may dial: a name server is not trusted with that.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rustls::pki_types::ServerName;

use crate::net::http_proxy::HttpProxy;

/// How many addresses of one host are dialled.
pub(crate) const MOST_ADDRESSES: usize = 32;

/// A host that proxy-servers answer at; their certificates must be for its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Host {
    /// A DNS name or an address.
    pub name: String,
    /// The agent port.
    pub port: u16,
    /// The HTTP proxy on the way.
    pub through: Option<Arc<HttpProxy>>,
}

/// Where a stream is made to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// An address of a host.
    Address(SocketAddr),
    /// The host of this number, by its name: an HTTP proxy resolves it.
    Proxied(usize),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address() {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            Some(IpAddr::V4(_)) | None => write!(f, "{}:{}", self.name, self.port),
        }
    }
}

impl Host {
    /// Reads `host`, `host:port`, an IPv6 address, or one in brackets with or without a port.
    pub fn parse(text: &str, port: u16) -> Result<Host, String> {
        let failed = || format!("`{text}` is neither a DNS name nor an address, with or without a port");
        let (name, given) = if text.parse::<IpAddr>().is_ok() {
            (text, None)
        } else if let Some(rest) = text.strip_prefix('[') {
            let (name, rest) = rest.split_once(']').ok_or_else(failed)?;
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(failed)?) };
            name.parse::<std::net::Ipv6Addr>().map_err(|_| failed())?;
            (name, port)
        } else {
            text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)))
        };
        let port = match given {
            None => port,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().map_err(|_| failed())?,
            Some(_) => return Err(failed()),
        };
        if port == 0 || ServerName::try_from(name).is_err() {
            return Err(failed());
        }
        Ok(Host { name: name.to_owned(), port, through: None })
    }

    /// The name, if it is an address.
    pub fn address(&self) -> Option<IpAddr> {
        self.name.parse().ok()
    }

    /// Every place that it stands for now; `number` is its own among all hosts.
    pub(crate) async fn resolve(&self, number: usize) -> io::Result<Vec<Place>> {
        if self.through.is_some() {
            return Ok(vec![Place::Proxied(number)]);
        }
        if let Some(address) = self.address() {
            return Ok(vec![Place::Address(SocketAddr::new(address, self.port))]);
        }
        let mut all: Vec<Place> = Vec::new();
        for address in tokio::net::lookup_host((self.name.as_str(), self.port)).await?.map(Place::Address) {
            if !all.contains(&address) && all.len() < MOST_ADDRESSES {
                all.push(address);
            }
        }
        if all.is_empty() { Err(io::Error::new(io::ErrorKind::NotFound, "no address")) } else { Ok(all) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_with_and_without_a_port() {
        let all = [
            ("10.0.0.1", "10.0.0.1:8091"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("fd00::1", "[fd00::1]:8091"),
            ("[fd00::1]", "[fd00::1]:8091"),
            ("[fd00::1]:8132", "[fd00::1]:8132"),
            ("proxy.example", "proxy.example:8091"),
            ("proxy.example:8132", "proxy.example:8132"),
        ];
        for (text, want) in all {
            assert_eq!(Host::parse(text, 8091).unwrap().to_string(), want);
        }
        for text in
            ["", ":1", "a:", "a:0", "a:+1", "a:65536", "a:1:2", "[a]:1", "[fd00::1", "[fd00::1]x", "a b", "https://a"]
        {
            assert!(Host::parse(text, 8091).is_err(), "{text}");
        }
    }
}
