//! Owns parsing `spec.edge`: the names of the uplinks of the edge tier.
//! Called by `compile`.
//! Must never check whether an interface exists: it may appear later, and the daemon waits for it.

use std::collections::BTreeSet;

use guard_common::packet::TCP;

use crate::{
    diagnostic::Diagnostic,
    document::{EdgeSpec, span},
    parse::{checked::GuardRule, scalars::Findings},
    ruleset::Mode,
};

/// The longest interface name in bytes (`IFNAMSIZ` without the terminating zero).
const LONGEST: usize = 15;

pub(crate) fn parse_edge(edge: &EdgeSpec, rules: &[GuardRule], findings: &mut Findings) -> BTreeSet<String> {
    if edge.interfaces.value.is_empty() {
        findings.add(
            Diagnostic::error(
                "NG019",
                span(&edge.interfaces),
                "the list of interfaces is empty",
                "add at least one interface",
            )
            .help("to do without the edge tier, remove `edge`"),
        );
    }
    let mut interfaces = BTreeSet::new();
    for text in &edge.interfaces.value {
        if is_name(&text.value) {
            interfaces.insert(text.value.clone());
        } else {
            findings.add(Diagnostic::error(
                "NG019",
                span(text),
                format!("`{}` is not a valid interface name", text.value),
                "a name has 1 to 15 bytes without spaces, `/` and `:`, as in `eth0`",
            ));
        }
    }
    let works = |rule: &GuardRule| !rule.node.is_empty() && rule.protocol == TCP && rule.mode == Mode::Enforce;
    if !rules.iter().any(works) {
        findings.add(Diagnostic::warning(
            "NG105",
            span(&edge.interfaces),
            "the edge tier will drop nothing",
            "no rule in enforce mode guards a TCP port of the node",
        ));
    }
    interfaces
}

/// Whether the kernel accepts an interface name (`dev_valid_name`).
fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':');
    (1..=LONGEST).contains(&text.len()) && !matches!(text, "." | "..") && text.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_the_kernel_takes_for_one() {
        for good in ["eth0", "enp0s31f6", "eth0.100", "a", "bond0_slave", "wlan%d", "123456789012345"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "eth 0", "eth/0", "eth0:1", "1234567890123456", "eth\u{e9}", "eth\n"] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
