//! Owns the ports of the node whose packets no socket of a process receives: the kernel takes them itself, or translates them before.
//! Called by `rules`.
//! Must never refuse a rule for such a port: a process may have it all the same.

use std::ops::RangeInclusive;

use guard_common::packet::UDP;

use crate::{
    diagnostic::Diagnostic,
    document::{NodePorts, span},
    parse::scalars::Findings,
};

/// UDP ports that the kernel usually takes itself.
const KERNEL: [(u16, &str); 7] = [
    (2152, "GTP"),
    (4500, "ESP in UDP"),
    (4789, "VXLAN"),
    (6081, "Geneve"),
    (8472, "VXLAN as flannel and Cilium have it"),
    (51820, "WireGuard"),
    (51871, "WireGuard as Cilium has it"),
];
/// The ports of Services of the type NodePort (kube-apiserver, `--service-node-port-range`).
const NODE_PORTS: RangeInclusive<u16> = 30000..=32767;
/// A wider range means every port, and not these.
const WIDE: usize = 3000;

/// Warns of ports that a rule for the node probably does not guard.
pub(crate) fn check(ports: &NodePorts, ranges: &[RangeInclusive<u16>], protocol: u8, findings: &mut Findings) {
    for range in ranges.iter().filter(|range| range.len() < WIDE) {
        if let Some((port, what)) = KERNEL.iter().find(|(port, _)| protocol == UDP && range.contains(port)) {
            findings.add(
                Diagnostic::warning(
                    "NG107",
                    span(&ports.ports),
                    format!("UDP port {port} is usually the kernel's own ({what})"),
                    "no socket of a process receives these datagrams, so this rule would guard nothing",
                )
                .help("close such a port at the uplink with another firewall (docs/platforms.md)"),
            );
        }
        if NODE_PORTS.contains(range.start()) && NODE_PORTS.contains(range.end()) {
            findings.add(
                Diagnostic::warning(
                    "NG108",
                    span(&ports.ports),
                    "these are ports of Services of the type NodePort",
                    "their packets are translated to the endpoint before a socket receives them, so this rule would guard nothing",
                )
                .help("to guard the endpoint, write a rule for the pod's own port"),
            );
        }
    }
}
