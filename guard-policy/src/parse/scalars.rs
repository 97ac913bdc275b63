//! Owns parsing the scalar values of a document strictly: ports, prefixes, names, modes.
//! Called by `compile` and the other files of `parse`.
//! Must never guess: a prefix with host bits or a reversed port range is an error that shows the correct notation.

use std::ops::{Range, RangeInclusive};

use guard_common::packet::{TCP, UDP};
use ipnet::IpNet;
use serde_saphyr::Spanned;

use crate::{diagnostic::Diagnostic, document::span, ruleset::Mode};

/// The findings of one compilation, in the order in which they were made.
#[derive(Default)]
pub(crate) struct Findings(pub(crate) Vec<Diagnostic>);

impl Findings {
    pub(crate) fn add(&mut self, diagnostic: Diagnostic) {
        self.0.push(diagnostic);
    }

    /// `Enforce` or `Audit`; `Enforce` after an error.
    pub(crate) fn mode(&mut self, text: &Spanned<String>) -> Mode {
        match text.value.as_str() {
            "Enforce" => Mode::Enforce,
            "Audit" => Mode::Audit,
            other => {
                self.add(Diagnostic::error(
                    "NG005",
                    span(text),
                    format!("unknown mode `{other}`"),
                    "write `Enforce` or `Audit`",
                ));
                Mode::Enforce
            }
        }
    }

    /// A name that fits into a metric label, a table and the kernel's table of names.
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
                format!("`{value}` is not a valid name"),
                "a name has 1 to 63 of a-z, 0-9, `-` and `.`, and begins and ends with a letter or a digit",
            ));
        }
        value.clone()
    }

    /// Ports and ranges, at least one.
    pub(crate) fn ports(&mut self, list: &Spanned<Vec<Spanned<String>>>) -> Vec<RangeInclusive<u16>> {
        if list.value.is_empty() {
            self.add(
                Diagnostic::error("NG006", span(list), "the list of ports is empty", "add at least one port")
                    .help("a rule without ports guards nothing; to guard nothing, remove the rule"),
            );
        }
        list.value.iter().filter_map(|text| self.port(text)).collect()
    }

    fn port(&mut self, text: &Spanned<String>) -> Option<RangeInclusive<u16>> {
        // Only digits: some parsers also accept `+80`, `0x50` and ` 80`, others do not.
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
                    format!("the port range `{}` is reversed", text.value),
                    format!("write `{right}`"),
                ));
                None
            }
            Some(range) => Some(range),
            None => {
                let message = format!("`{}` is neither a port nor a port range", text.value);
                self.add(Diagnostic::error(
                    "NG006",
                    span(text),
                    message,
                    "write a number from 1 to 65535, or `first-last`",
                ));
                None
            }
        }
    }

    /// `TCP`, which is the default, or `UDP`.
    pub(crate) fn protocol(&mut self, text: Option<&Spanned<String>>) -> u8 {
        match text.map(|text| (text, text.value.as_str())) {
            None | Some((_, "TCP")) => TCP,
            Some((_, "UDP")) => UDP,
            Some((text, other)) => {
                self.add(Diagnostic::error(
                    "NG015",
                    span(text),
                    format!("unsupported protocol `{other}`"),
                    "write `TCP` or `UDP`",
                ));
                TCP
            }
        }
    }

    /// Requires `TCP`, where no other protocol is possible.
    pub(crate) fn only_tcp(&mut self, text: Option<&Spanned<String>>) {
        if let Some(text) = text.filter(|text| text.value != "TCP") {
            self.add(Diagnostic::error(
                "NG015",
                span(text),
                "the tunnel carries only TCP",
                "write `TCP`, or remove `protocol`",
            ));
        }
    }

    /// A list of prefixes, at least one.
    pub(crate) fn cidrs(&mut self, cidrs: &Spanned<Vec<Spanned<String>>>, help: &'static str) -> Vec<IpNet> {
        if cidrs.value.is_empty() {
            self.add(
                Diagnostic::error("NG007", span(cidrs), "the list of prefixes is empty", "add at least one prefix")
                    .help(help),
            );
        }
        cidrs.value.iter().filter_map(|text| self.cidr(text)).collect()
    }

    /// The path of a cgroup: absolute, normalised, and not the root, which contains every process.
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
                format!("`{}` is not the path of a cgroup", text.value),
                "write an absolute path without `.` and `..`, as in `/system.slice/kubelet.service`",
            )
            .help("`cat /proc/PID/cgroup` shows the cgroup of a process after `0::`"),
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
                    format!("`{value}` is not a CIDR prefix"),
                    "write an address and a length, as in `10.0.8.0/24` or `fd00:8::/64`",
                );
                self.add(match value.parse::<std::net::IpAddr>() {
                    Ok(address) => {
                        diagnostic.help(format!("for this single address, write `{}`", IpNet::from(address)))
                    }
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
                format!("`{value}` is an IPv4 prefix in IPv6 notation"),
                format!("write `{v4}/{length}`"),
            ));
            return None;
        }
        if net.trunc() != net {
            let message = format!("`{value}` has bits set beyond its prefix length");
            self.add(
                Diagnostic::error("NG007", span(text), message, format!("the network is `{}`", net.trunc())).help(
                    format!(
                        "write `{}` for the network, or `{}` for the single address",
                        net.trunc(),
                        IpNet::from(net.addr())
                    ),
                ),
            );
            return None;
        }
        Some(net)
    }
}

/// Ports in the notation of the document: `8080,9000-9010`.
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

/// The smallest span that contains both spans.
pub(crate) fn join(first: &Range<usize>, second: &Range<usize>) -> Range<usize> {
    first.start.min(second.start)..first.end.max(second.end)
}
