//! Owns which HTTP proxy a connection goes through: HTTPS_PROXY and NO_PROXY, with the rules of Go's programs.
//! Called by the command line for the proxy-servers and by `cluster/api_server`; `http_connect` then sends CONNECT to the proxy.
//! Must never show a password, and never connect without the proxy because its variable cannot be read.
//!
//! The rules are those of `golang.org/x/net/http/httpproxy`, which grpc-go uses, and with it the upstream agent.

use std::{fmt, net::IpAddr};

use data_encoding::BASE64;
use ipnet::IpNet;
use percent_encoding::percent_decode_str;

use crate::net::host_port::HostPort;

/// An HTTP proxy that understands CONNECT.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HttpProxy {
    /// Where it is.
    pub(crate) at: HostPort,
    /// The value of `Proxy-Authorization`.
    pub(crate) authorization: Option<String>,
}

impl fmt::Display for HttpProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.at.fmt(f)
    }
}

impl fmt::Debug for HttpProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the environment variables say about HTTP proxies.
#[derive(Clone, Debug, Default)]
pub struct ProxyEnvironment {
    proxy: Option<HttpProxy>,
    exceptions: Vec<Exception>,
}

/// Why HTTPS_PROXY cannot be used. The value is never shown: it may contain a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// Not HTTP.
    #[error("HTTPS_PROXY is not an http:// URL: only an HTTP proxy can be used (CONNECT)")]
    Scheme,
    /// An https:// URL with a password.
    #[error(
        "HTTPS_PROXY is an https:// URL with a password: like the upstream agent, the guard speaks plain HTTP to the proxy, so the password would be sent in the clear; write http:// if you accept that"
    )]
    Password,
    /// No host.
    #[error("HTTPS_PROXY names no proxy; write it as in http://user:password@proxy.example:3128")]
    Unreadable,
}

/// Hosts that NO_PROXY excludes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Exception {
    /// `*`
    Everybody,
    Prefix(IpNet),
    /// If there is a port, only that one.
    Address(IpAddr, Option<String>),
    Name {
        /// The name with a leading dot.
        suffix: String,
        /// Whether the name itself is excluded, too.
        itself: bool,
        port: Option<String>,
    },
}

impl ProxyEnvironment {
    /// Reads the variables: upper case before lower case; an empty variable counts as unset. `port` is the default port of a proxy.
    pub fn read(variable: impl Fn(&str) -> Option<String>, port: u16) -> Result<ProxyEnvironment, ProxyError> {
        let either = |upper: &str, lower: &str| {
            [upper, lower].iter().find_map(|name| variable(name).filter(|value| !value.is_empty()))
        };
        let proxy = either("HTTPS_PROXY", "https_proxy").map(|url| HttpProxy::parse(&url, port)).transpose()?;
        let exceptions = either("NO_PROXY", "no_proxy").map(|list| exceptions(&list)).unwrap_or_default();
        Ok(ProxyEnvironment { proxy, exceptions })
    }

    /// The proxy that connections to this host go through.
    pub fn proxy_for(&self, host: &HostPort) -> Option<HttpProxy> {
        let address = host.address().map(|address| address.to_canonical());
        let local = host.name.eq_ignore_ascii_case("localhost") || address.is_some_and(|address| address.is_loopback());
        let (name, port) = (host.name.to_ascii_lowercase(), host.port.to_string());
        let excepted = self.exceptions.iter().any(|exception| exception.holds(&name, address, &port));
        self.proxy.clone().filter(|_| !local && !excepted)
    }
}

impl HttpProxy {
    /// Reads `[http://][user[:password]@]host[:port][/...]`.
    pub(crate) fn parse(url: &str, port: u16) -> Result<HttpProxy, ProxyError> {
        let (scheme, rest) = url.trim().split_once("://").unwrap_or(("http", url.trim()));
        let secure = scheme.eq_ignore_ascii_case("https");
        if !secure && !scheme.eq_ignore_ascii_case("http") {
            return Err(ProxyError::Scheme);
        }
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        let authorization = user.filter(|user| !user.is_empty()).map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
            format!("Basic {}", BASE64.encode(&[&decoded(name), &b":"[..], &decoded(password)].concat()))
        });
        if secure && authorization.is_some() {
            return Err(ProxyError::Password);
        }
        let at = HostPort::parse(host, port).map_err(|_| ProxyError::Unreadable)?;
        Ok(HttpProxy { at, authorization })
    }
}

fn exceptions(list: &str) -> Vec<Exception> {
    let entries = list.split(',').map(|entry| entry.trim().to_lowercase()).filter(|entry| !entry.is_empty());
    entries.filter_map(|entry| exception(&entry)).collect()
}

/// Reads one entry. An entry without a meaning is ignored, as in Go.
fn exception(entry: &str) -> Option<Exception> {
    if entry == "*" {
        return Some(Exception::Everybody);
    }
    if let Ok(prefix) = entry.parse::<IpNet>() {
        return Some(Exception::Prefix(prefix));
    }
    let (name, port) = split(entry).unwrap_or((entry, ""));
    let port = (!port.is_empty()).then(|| port.to_owned());
    if let Ok(address) = name.parse::<IpAddr>() {
        return Some(Exception::Address(address.to_canonical(), port));
    }
    let name = name.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(name);
    match name.strip_prefix('.') {
        Some(_) => Some(Exception::Name { suffix: name.to_owned(), itself: false, port }),
        None if name.is_empty() => None,
        None => Some(Exception::Name { suffix: format!(".{name}"), itself: true, port }),
    }
}

/// Host and port, as `net.SplitHostPort` finds them.
fn split(entry: &str) -> Option<(&str, &str)> {
    let (host, port) = entry.rsplit_once(':')?;
    match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|inner| !inner.contains(['[', ']'])).map(|inner| (inner, port)),
        None => (!host.contains([':', '[', ']']) && !port.contains(['[', ']'])).then_some((host, port)),
    }
}

impl Exception {
    fn holds(&self, name: &str, address: Option<IpAddr>, port: &str) -> bool {
        let at = |wanted: &Option<String>| wanted.as_deref().is_none_or(|wanted| wanted == port);
        match (self, address) {
            (Exception::Everybody, _) => true,
            (Exception::Prefix(prefix), Some(address)) => prefix.contains(&address),
            (Exception::Address(wanted, only), Some(address)) => *wanted == address && at(only),
            (Exception::Name { suffix, itself, port: only }, None) => {
                let same = *itself && suffix.strip_prefix('.') == Some(name);
                (same || name.ends_with(suffix.as_str())) && at(only)
            }
            (Exception::Prefix(_) | Exception::Address(..), None) | (Exception::Name { .. }, Some(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Result<ProxyEnvironment, ProxyError> {
        let find = |name: &str| pairs.iter().find(|(each, _)| *each == name).map(|(_, value)| (*value).to_owned());
        ProxyEnvironment::read(find, 443)
    }

    fn proxied(no: &str, host: &str) -> bool {
        let environment = environment(&[("HTTPS_PROXY", "proxy.example:3128"), ("NO_PROXY", no)]).unwrap();
        environment.proxy_for(&HostPort::parse(host, 8132).unwrap()).is_some()
    }

    #[test]
    fn a_proxy_is_a_url_or_a_host() {
        for (url, want, authorization) in [
            ("http://proxy.example:3128", "proxy.example:3128", None),
            ("proxy.example:3128", "proxy.example:3128", None),
            ("proxy.example", "proxy.example:443", None),
            ("HTTP://10.0.0.9/", "10.0.0.9:443", None),
            ("https://proxy.example:3129/x?y#z", "proxy.example:3129", None),
            ("http://[fd00::9]:3128", "[fd00::9]:3128", None),
            ("http://u:p@proxy.example:1", "proxy.example:1", Some("Basic dTpw")),
            ("http://u@proxy.example:1", "proxy.example:1", Some("Basic dTo=")),
            // A colon, an at sign and a slash, as a URL writes them.
            ("http://a%3Ab:c%40d%2Fe@proxy.example:1", "proxy.example:1", Some("Basic YTpiOmNAZC9l")),
            ("http://u:p@ss@proxy.example:1", "proxy.example:1", Some("Basic dTpwQHNz")),
        ] {
            let proxy = HttpProxy::parse(url, 443).unwrap();
            assert_eq!((proxy.to_string().as_str(), proxy.authorization.as_deref()), (want, authorization), "{url}");
        }
        for (url, error) in [
            ("socks5://proxy.example:1080", ProxyError::Scheme),
            ("://x", ProxyError::Scheme),
            ("https://u:p@proxy.example", ProxyError::Password),
            ("http://", ProxyError::Unreadable),
            ("http://:3128", ProxyError::Unreadable),
            ("http://proxy.example:0", ProxyError::Unreadable),
            ("http://a b:1", ProxyError::Unreadable),
            ("http://proxy.example:http", ProxyError::Unreadable),
        ] {
            assert_eq!(HttpProxy::parse(url, 443), Err(error), "{url}");
        }
        let proxy = HttpProxy::parse("http://user:secret@proxy.example:1", 443).unwrap();
        assert!(!format!("{proxy} {proxy:?}").contains("secret"));
        assert!(!ProxyError::Unreadable.to_string().contains("secret"));
    }

    #[test]
    fn the_variables_have_an_order_and_an_empty_one_is_none() {
        let host = HostPort::parse("a.example", 1).unwrap();
        let of = |pairs: &[(&str, &str)]| environment(pairs).unwrap().proxy_for(&host).map(|proxy| proxy.to_string());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("HTTPS_PROXY", "")]), None);
        assert_eq!(of(&[("HTTP_PROXY", "p:1"), ("ALL_PROXY", "p:1")]), None);
        assert_eq!(of(&[("HTTPS_PROXY", ""), ("https_proxy", "q:2")]).as_deref(), Some("q:2"));
        assert_eq!(of(&[("https_proxy", "q:2"), ("HTTPS_PROXY", "p:1")]).as_deref(), Some("p:1"));
        assert_eq!(of(&[("HTTPS_PROXY", "p:1"), ("no_proxy", "a.example")]), None);
        assert_eq!(of(&[("HTTPS_PROXY", "p:1"), ("NO_PROXY", "b"), ("no_proxy", "a.example")]).as_deref(), Some("p:1"));
        assert_eq!(environment(&[("HTTPS_PROXY", "http://:3128")]).unwrap_err(), ProxyError::Unreadable);
    }

    /// Each line was asked of `httpproxy` of golang.org/x/net v0.55.0 too.
    #[test]
    fn exceptions_are_gos() {
        for (no, host, want) in [
            ("", "a.example", true),
            ("", "localhost", false),
            ("", "127.0.0.9", false),
            ("", "::1", false),
            ("*", "a.example", false),
            ("b.example, *", "a.example", false),
            ("*", "10.0.0.1", false),
            ("example", "a.example", false),
            ("example", "example", false),
            ("ample", "a.example", true),
            (".example", "a.example", false),
            (".example", "example", true),
            ("*.example", "a.b.example", false),
            ("*.example", "example", true),
            ("*example", "a.example", true),
            ("A.Example", "a.example", false),
            ("a.example", "A.EXAMPLE", false),
            ("a.example:8132", "a.example", false),
            ("a.example:8133", "a.example", true),
            ("a.example:", "a.example", false),
            (":8132", "a.example", true),
            ("a.example:http", "a.example", true),
            (" b.example , a.example ", "a.example", false),
            ("b.example a.example", "a.example", true),
            ("10.0.0.0/8", "10.1.2.3", false),
            ("10.9.9.9/8", "10.1.2.3", false),
            ("10.0.0.0/8", "11.1.2.3", true),
            ("10.1.2.3", "10.1.2.3", false),
            ("10.1.2.3:8132", "10.1.2.3", false),
            ("10.1.2.3:8133", "10.1.2.3", true),
            ("fd00::/8", "fd00::1", false),
            ("fd00::1", "fd00:0::1", false),
            ("[fd00::1]:8132", "fd00::1", false),
            ("[fd00::1]:8133", "fd00::1", true),
            ("[fd00::1]", "fd00::1", true),
            ("10.0.0.0/8", "a.example", true),
            ("0.0.0.0/0", "fd00::1", true),
            (".2.3", "10.1.2.3", true),
        ] {
            assert_eq!(proxied(no, host), want, "NO_PROXY={no} {host}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(url in ".{0,40}", no in ".{0,40}") {
            let _ = HttpProxy::parse(&url, 443);
            let _ = exceptions(&no);
            let _ = HttpProxy::parse(&format!("http://{url}"), 443);
        }

        #[test]
        fn a_name_is_excepted_with_all_below_it_and_nothing_beside_it(label in "[a-z]{1,8}", other in "[a-z]{1,8}") {
            let no = format!("{label}.example");
            prop_assert!(!proxied(&no, &no));
            let (below, beside) = (format!("{other}.{no}"), format!("{other}{no}"));
            prop_assert!(!proxied(&no, &below));
            prop_assert!(proxied(&no, &beside));
        }
    }
}
