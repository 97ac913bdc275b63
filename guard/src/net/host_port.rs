//! Owns a host with a port, as flags, kubeconfigs and proxy variables write it.
//! Called by `remote_host`, `http_proxy` and the command line.
//! Must never accept a text that is neither a DNS name nor an address: what is accepted here is used as the name in TLS.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use rustls::pki_types::ServerName;

/// A host with a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// A DNS name or an address.
    pub name: String,
    /// The port.
    pub port: u16,
}

/// The text is not a host with a port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a DNS name nor an address, with or without a port")]
pub struct HostPortError(pub String);

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address() {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            Some(IpAddr::V4(_)) | None => write!(f, "{}:{}", self.name, self.port),
        }
    }
}

impl HostPort {
    /// Reads `host`, `host:port`, an IPv6 address, or one in brackets with or without a port.
    pub fn parse(text: &str, default_port: u16) -> Result<HostPort, HostPortError> {
        let failed = || HostPortError(text.to_owned());
        let (name, given) = if text.parse::<IpAddr>().is_ok() {
            (text, None)
        } else if let Some(rest) = text.strip_prefix('[') {
            let (name, rest) = rest.split_once(']').ok_or_else(failed)?;
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(failed)?) };
            name.parse::<Ipv6Addr>().map_err(|_| failed())?;
            (name, port)
        } else {
            text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)))
        };
        let port = match given {
            None => default_port,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().map_err(|_| failed())?,
            Some(_) => return Err(failed()),
        };
        if port == 0 || ServerName::try_from(name).is_err() {
            return Err(failed());
        }
        Ok(HostPort { name: name.to_owned(), port })
    }

    /// The address, if the name is one.
    pub fn address(&self) -> Option<IpAddr> {
        self.name.parse().ok()
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
            assert_eq!(HostPort::parse(text, 8091).unwrap().to_string(), want);
        }
        for text in
            ["", ":1", "a:", "a:0", "a:+1", "a:65536", "a:1:2", "[a]:1", "[fd00::1", "[fd00::1]x", "a b", "https://a"]
        {
            assert!(HostPort::parse(text, 8091).is_err(), "{text}");
        }
    }
}
