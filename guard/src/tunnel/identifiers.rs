//! Owns the identifiers by which the control plane may dial this agent: strict reading, and the one form that a server matches.
//! Called by the command line at the start, by `Tunnel::advertise` when they change, and by `stream/establish`, which sends them.
//! Must never write an address in another form than RFC 5952: the server compares strings.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use percent_encoding::percent_decode_str;

use crate::sys::units;

/// One identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identifier {
    /// `ipv4=`.
    V4(Ipv4Addr),
    /// `ipv6=`.
    V6(Ipv6Addr),
    /// `host=`, in exactly this spelling.
    Host(String),
    /// `cidr=`: accepted as upstream accepts it; no server matches it.
    Cidr(IpNet),
    /// `default-route=`.
    DefaultRoute(bool),
}

/// All identifiers of this agent, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identifiers(Vec<Identifier>);

/// The text is not a list of identifiers.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--agent-identifiers: `{pair}` {why}; it is a URL query of ipv4, ipv6, host, cidr and default-route, as in `ipv4=10.0.0.1&host=node1`"
)]
pub struct IdentifierError {
    /// The part.
    pub pair: String,
    why: &'static str,
}

impl Identifiers {
    /// Reads a URL query.
    pub fn parse(text: &str) -> Result<Identifiers, IdentifierError> {
        let mut all = Identifiers::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let failed = |why| IdentifierError { pair: pair.to_owned(), why };
            if pair.contains(';') {
                return Err(failed("has a `;`, which servers refuse"));
            }
            let (key, value) = pair.split_once('=').ok_or(failed("has no value"))?;
            let value = decode(value).ok_or(failed("is not URL-encoded"))?;
            let identifier = match key {
                "ipv4" => value.parse().ok().map(Identifier::V4).ok_or(failed("is not an IPv4 address"))?,
                "ipv6" => value.parse().ok().map(Identifier::V6).ok_or(failed("is not an IPv6 address"))?,
                "host" if is_host(&value) => Identifier::Host(value),
                "host" => return Err(failed("is not a host name")),
                "cidr" => value.parse().ok().map(Identifier::Cidr).ok_or(failed("is not a CIDR prefix"))?,
                "default-route" => {
                    Identifier::DefaultRoute(units::boolean(&value).map_err(|_| failed("is neither true nor false"))?)
                }
                _ => return Err(failed("is not known")),
            };
            all.add(identifier);
        }
        Ok(all)
    }

    /// Adds an identifier. A host name is added in lower case, too: the API server may dial either.
    pub fn add(&mut self, identifier: Identifier) {
        let lower = match &identifier {
            Identifier::Host(name) if name.bytes().any(|byte| byte.is_ascii_uppercase()) => {
                Some(Identifier::Host(name.to_ascii_lowercase()))
            }
            Identifier::Host(_)
            | Identifier::V4(_)
            | Identifier::V6(_)
            | Identifier::Cidr(_)
            | Identifier::DefaultRoute(_) => None,
        };
        for identifier in [Some(identifier), lower].into_iter().flatten() {
            if !self.0.contains(&identifier) {
                self.0.push(identifier);
            }
        }
    }

    /// Adds an address.
    pub fn add_address(&mut self, address: IpAddr) {
        self.add(match address {
            IpAddr::V4(address) => Identifier::V4(address),
            IpAddr::V6(address) => Identifier::V6(address),
        });
    }

    /// The host names.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|identifier| match identifier {
            Identifier::Host(name) => Some(name.as_str()),
            Identifier::V4(_) | Identifier::V6(_) | Identifier::Cidr(_) | Identifier::DefaultRoute(_) => None,
        })
    }

    /// Whether there is no identifier.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Identifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, identifier) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("&")?;
            }
            // Nothing here needs an escape: a host name has no other characters, and a query may hold `:` and `/`.
            match identifier {
                Identifier::V4(address) => write!(f, "ipv4={address}")?,
                Identifier::V6(address) => write!(f, "ipv6={address}")?,
                Identifier::Host(name) => write!(f, "host={name}")?,
                Identifier::Cidr(cidr) => write!(f, "cidr={cidr}")?,
                Identifier::DefaultRoute(yes) => write!(f, "default-route={yes}")?,
            }
        }
        Ok(())
    }
}

fn is_host(name: &str) -> bool {
    (1..=253).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

/// Decodes a value of a URL query. An escape that is none stays as it is, and no kind of identifier accepts a `%`.
fn decode(text: &str) -> Option<String> {
    percent_decode_str(&text.replace('+', " ")).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_come_out_in_the_form_that_is_compared() {
        let all = [
            ("ipv6=FD00:0:0::0002&ipv6=fd00::2", "ipv6=fd00::2"),
            ("ipv6=fd00%3A%3a1&host=Node-1&ipv4=10.0.0.1", "ipv6=fd00::1&host=Node-1&host=node-1&ipv4=10.0.0.1"),
            ("cidr=10.0.0.0%2F8&default-route=T", "cidr=10.0.0.0/8&default-route=true"),
            ("", ""),
        ];
        for (text, canonical) in all {
            assert_eq!(Identifiers::parse(text).unwrap().to_string(), canonical);
        }
    }

    #[test]
    fn what_a_server_would_ignore_or_refuse_is_an_error() {
        for text in [
            "ip=1",
            "ipv4",
            "ipv4=fd00::1",
            "ipv6=10.0.0.1",
            "ipv4=10.0.0.1;host=a",
            "host=",
            "host=a b",
            "host=%zz",
            "host=%4",
            "cidr=10.0.0.0",
            "default-route=maybe",
            "ipv4=010.0.0.1",
            "HOST=a",
        ] {
            assert!(Identifiers::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_the_same(v4 in any::<u32>(), v6 in any::<u128>(), host in "[A-Za-z0-9._-]{1,40}", yes in any::<bool>()) {
            let mut all = Identifiers::default();
            all.add_address(Ipv4Addr::from_bits(v4).into());
            all.add_address(Ipv6Addr::from_bits(v6).into());
            all.add(Identifier::Host(host));
            all.add(Identifier::DefaultRoute(yes));
            prop_assert_eq!(Identifiers::parse(&all.to_string()).unwrap(), all);
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,60}") {
            let _ = Identifiers::parse(&text);
        }
    }
}
