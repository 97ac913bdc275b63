//! Owns the leaf values of a document: ports, prefixes, names, modes, each read strictly and with its place.
//! Called by `compile`.
//! Must never guess: a prefix with host bits or a port range written backwards is an error that shows the right spelling.

use std::ops::{Range, RangeInclusive};

use guard_common::packet::{TCP, UDP};
use ipnet::IpNet;
use serde_saphyr::Spanned;

use crate::{diagnostic::Diagnostic, document::span, ruleset::Mode};

/// The findings of one compilation, as they come.
#[derive(Default)]
pub(crate) struct Findings(pub(crate) Vec<Diagnostic>);

impl Findings {
    pub(crate) fn add(&mut self, diagnostic: Diagnostic) {
        self.0.push(diagnostic);
    }

    /// `Enforce` or `Audit`; on an error, the stricter one.
    pub(crate) fn mode(&mut self, text: &Spanned<String>) -> Mode {
        match text.value.as_str() {
            "Enforce" => Mode::Enforce,
            "Audit" => Mode::Audit,
            other => {
                self.add(Diagnostic::error(
                    "NG005",
                    span(text),
                    format!("unknown mode `{other}`"),
                    "`Enforce` or `Audit`",
                ));
                Mode::Enforce
            }
        }
    }

    /// A name: what fits in a metric label, a table and the kernel's name table.
    pub(crate) fn name(&mut self, text: &Spanned<String>) -> String {
        let value = &text.value;
        let letters =
            value.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.'));
        let edges = value
            .bytes()
            .next()
            .zip(value.bytes().last())
            .is_some_and(|(first, last)| first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric());
        if !letters || !edges || value.len() > 63 {
            self.add(Diagnostic::error(
                "NG011",
                span(text),
                format!("`{value}` is no name"),
                "1 to 63 of a-z, 0-9, `-` and `.`, beginning and ending with a letter or digit",
            ));
        }
        value.clone()
    }

    /// Ports and ranges, at least one.
    pub(crate) fn ports(&mut self, list: &Spanned<Vec<Spanned<String>>>) -> Vec<RangeInclusive<u16>> {
        if list.value.is_empty() {
            self.add(
                Diagnostic::error("NG006", span(list), "no ports", "name at least one")
                    .help("a rule without ports would guard nothing; remove it if that is meant"),
            );
        }
        list.value.iter().filter_map(|text| self.port(text)).collect()
    }

    fn port(&mut self, text: &Spanned<String>) -> Option<RangeInclusive<u16>> {
        // Only digits: `+80`, `0x50` and ` 80` are numbers to some parsers and none to others.
        let number = |text: &str| {
            text.bytes()
                .all(|byte| byte.is_ascii_digit())
                .then(|| text.parse::<u16>().ok())
                .flatten()
                .filter(|port| *port != 0)
        };
        let range = match text.value.split_once('-') {
            Some((first, last)) => number(first).zip(number(last)).map(|(first, last)| first..=last),
            None => number(&text.value).map(|port| port..=port),
        };
        match range {
            Some(range) if range.is_empty() => {
                let right = format!("{}-{}", range.end(), range.start());
                self.add(Diagnostic::error(
                    "NG006",
                    span(text),
                    format!("`{}` is a port range written backwards", text.value),
                    format!("write `{right}`"),
                ));
                None
            }
            Some(range) => Some(range),
            None => {
                let message = format!("`{}` is neither a port nor a range of ports", text.value);
                self.add(Diagnostic::error("NG006", span(text), message, "a number from 1 to 65535, or `first-last`"));
                None
            }
        }
    }

    /// `TCP`, which is also what a missing protocol means, or `UDP`.
    pub(crate) fn protocol(&mut self, text: Option<&Spanned<String>>) -> u8 {
        match text.map(|text| (text, text.value.as_str())) {
            None | Some((_, "TCP")) => TCP,
            Some((_, "UDP")) => UDP,
            Some((text, other)) => {
                self.add(Diagnostic::error(
                    "NG015",
                    span(text),
                    format!("protocol `{other}` cannot be guarded"),
                    "`TCP` or `UDP`",
                ));
                TCP
            }
        }
    }

    /// `TCP` where nothing else can be meant.
    pub(crate) fn only_tcp(&mut self, text: Option<&Spanned<String>>) {
        if let Some(text) = text.filter(|text| text.value != "TCP") {
            self.add(Diagnostic::error("NG015", span(text), "the tunnel carries TCP alone", "`TCP`, or leave it out"));
        }
    }

    /// A list of prefixes, at least one.
    pub(crate) fn cidrs(&mut self, cidrs: &Spanned<Vec<Spanned<String>>>, help: &'static str) -> Vec<IpNet> {
        if cidrs.value.is_empty() {
            self.add(Diagnostic::error("NG007", span(cidrs), "no prefixes", "name at least one").help(help));
        }
        cidrs.value.iter().filter_map(|text| self.cidr(text)).collect()
    }

    /// The path of a cgroup: absolute, in its one spelling, and not the root, in which everything is.
    pub(crate) fn cgroup(&mut self, text: &Spanned<String>) -> Option<String> {
        let value = text.value.strip_suffix('/').unwrap_or(&text.value);
        let parts = value.strip_prefix('/').map(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
        if parts == Some(true) {
            return Some(value.to_owned());
        }
        self.add(
            Diagnostic::error(
                "NG016",
                span(text),
                format!("`{}` is no path of a cgroup", text.value),
                "as in `/system.slice/kubelet.service`",
            )
            .help("`cat /proc/PID/cgroup` shows the path of a process behind `0::`"),
        );
        None
    }

    /// A prefix, written as its network address.
    pub(crate) fn cidr(&mut self, text: &Spanned<String>) -> Option<IpNet> {
        let value = &text.value;
        let net = match value.parse::<IpNet>() {
            Ok(net) => net,
            Err(_) => {
                let diagnostic = Diagnostic::error(
                    "NG007",
                    span(text),
                    format!("`{value}` is no prefix"),
                    "an address and a length, as in `10.0.8.0/24` or `fd00:8::/64`",
                );
                self.add(match value.parse::<std::net::IpAddr>() {
                    Ok(address) => diagnostic.help(format!("for this one address write `{}`", IpNet::from(address))),
                    Err(_) => diagnostic,
                });
                return None;
            }
        };
        if let IpNet::V6(v6) = &net
            && let Some(v4) = v6.addr().to_ipv4_mapped()
            && let Some(length) = v6.prefix_len().checked_sub(96)
        {
            self.add(Diagnostic::error(
                "NG007",
                span(text),
                format!("`{value}` is an IPv4 prefix in IPv6 spelling"),
                format!("write `{v4}/{length}`"),
            ));
            return None;
        }
        if net.trunc() != net {
            let message = format!("`{value}` has bits set beyond its length");
            self.add(
                Diagnostic::error("NG007", span(text), message, format!("the network is `{}`", net.trunc()))
                    .help(format!("write `{}`, or `{}` for the one address", net.trunc(), IpNet::from(net.addr()))),
            );
            return None;
        }
        Some(net)
    }
}

/// Ports as a person writes them: `8080,9000-9010`.
pub(crate) fn port_text(ports: &[RangeInclusive<u16>]) -> String {
    let one = |range: &RangeInclusive<u16>| {
        if range.start() == range.end() {
            range.start().to_string()
        } else {
            format!("{}-{}", range.start(), range.end())
        }
    };
    ports.iter().map(one).collect::<Vec<_>>().join(",")
}

/// The place of a pair of values.
pub(crate) fn join(first: &Range<usize>, second: &Range<usize>) -> Range<usize> {
    first.start.min(second.start)..first.end.max(second.end)
}
