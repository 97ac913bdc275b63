//! Every shape of packet that docs/packets.md names, sent to a guarded port of the node and of a pod: by a stranger, by an allowed peer, and on
//! a flow that has a pinhole.

use std::net::SocketAddr;

use anyhow::Result;
use guard_common::{
    abi::Pinhole,
    packet::{TCP, UDP},
};
use lab::{
    daemon::Rights,
    judged::{self, Counts, Sender, check},
    lab::Lab,
    net::Who,
    packets::Flow,
    process::{command, output},
    shapes::{all, flow_of},
    wire::{Wire, hardware},
};
use nodeguard::kernel::{
    pinholes::OpenPinholes,
    tables::{apply::Apply, ruleset_maps::RulesetMaps},
};

pub(crate) const HTTP: u16 = 10_251;
pub(crate) const ECHO: u16 = 10_253;
pub(crate) const WEB: u16 = 8080;

pub(crate) const POLICY: &str = "\
apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata: {name: lab}
spec:
  mode: Enforce
  guard:
    - {name: http, node: {ports: [10251, 10259]}, allow: [tunnel: {}, ipBlock: {cidr: 10.0.8.0/24}, ipBlock: {cidr: 'fd00:8::/32'}]}
    - {name: echo, node: {ports: [10253], protocol: UDP}, allow: [ipBlock: {cidr: 10.0.8.0/24}, ipBlock: {cidr: 'fd00:8::/32'}]}
    - {name: web, pods: {cidrs: [10.244.0.0/16, 'fd01:244::/32'], ports: [8080]}, allow: [tunnel: {}, ipBlock: {cidr: 10.0.8.0/24}, ipBlock: {cidr: 'fd00:8::/32'}]}
    - {name: pod-echo, pods: {cidrs: [10.244.0.0/16, 'fd01:244::/32'], ports: [10253], protocol: UDP}, allow: [ipBlock: {cidr: 10.0.8.0/24}, ipBlock: {cidr: 'fd00:8::/32'}]}
  tunnel: {dial: []}
";

/// Addresses that no stack answers for: what comes back to them is heard on the wire alone.
pub(crate) fn silent(who: Who, v6: bool) -> std::net::IpAddr {
    let text = match (who, v6) {
        (Who::Peer, false) => "10.0.8.33",
        (Who::Peer, true) => "fd00:8::33",
        (_, false) => "10.0.0.33",
        (_, true) => "fd00::33",
    };
    text.parse().unwrap()
}

/// A guarded node and pod with echo servers, and neighbours that are known without asking.
pub(crate) fn lab() -> Lab {
    lab_with(Rights::Root)
}

/// The same with a guard that may do this.
pub(crate) fn lab_with(rights: Rights) -> Lab {
    let mut lab = Lab::bare().unwrap();
    lab.setup.rights = rights;
    lab.start_in(Who::Node, "", &["pod", &format!("[::]:{HTTP}")]).unwrap();
    for who in [Who::Node, Who::Pod] {
        lab.start_in(who, "", &["echo", &format!("[::]:{ECHO}")]).unwrap();
    }
    lab.write_policy(POLICY).unwrap();
    lab.start_daemon().unwrap();
    for who in [Who::Stranger, Who::Peer] {
        let (_, mac) = lab.net.run(who, || hardware("eth0")).unwrap();
        for v6 in [false, true] {
            neighbour(&lab, &silent(who, v6).to_string(), mac);
        }
    }
    lab
}

fn neighbour(lab: &Lab, address: &str, mac: [u8; 6]) {
    let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    in_node(lab, &["ip", "neighbour", "replace", address, "lladdr", &mac.join(":"), "dev", "eth0", "nud", "permanent"]);
}

/// Runs a command in the node's network namespace, outside the guarded cgroup; it has to succeed.
pub(crate) fn in_node(lab: &Lab, words: &[&str]) {
    let path =
        ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(|directory| std::path::Path::new(directory).join(words[0]));
    let program = path.iter().find(|path| path.is_file()).unwrap_or_else(|| panic!("{} is not installed", words[0]));
    let outside = lab.guarded.parent().unwrap();
    let mut command = command(program, lab.net.open(Who::Node).unwrap(), outside).unwrap();
    let said = output(command.args(&words[1..])).unwrap();
    assert_eq!(said.code, 0, "{words:?}: {}", said.error);
}

/// The wire of a sender, the node being the next hop.
pub(crate) fn wire(lab: &Lab, who: Who) -> Wire {
    let (_, node) = lab.net.run(Who::Node, || hardware("eth0")).unwrap();
    lab.net.run(who, || Wire::open("eth0", node)).unwrap()
}

/// What the guard has counted, read from the pinned maps.
pub(crate) fn counter(lab: &Lab) -> impl Fn() -> Result<Counts> + use<> {
    let apply = Apply::new(RulesetMaps::pinned(&lab.directory.join("bpf/nodeguard")).unwrap()).unwrap();
    move || judged::counts(&apply)
}

/// Opens and closes pinholes as the guard's own dials do.
pub(crate) struct Pinholes(OpenPinholes);

impl Pinholes {
    pub(crate) fn of(lab: &Lab) -> Pinholes {
        let pins = lab.pins();
        Pinholes(OpenPinholes::pinned(&pins, "PINHOLES").unwrap())
    }

    pub(crate) fn open(&mut self, flow: Flow) {
        self.0.insert(flow.key(), Pinhole::of(Pinhole::TUNNEL)).unwrap();
    }

    pub(crate) fn close(&mut self, flow: Flow) {
        let _ = self.0.remove(&flow.key());
    }
}

/// Sends every shape to a place; how many attempts that were.
fn every_shape(target: Who) {
    let lab = lab();
    let (stranger, peer) = (wire(&lab, Who::Stranger), wire(&lab, Who::Peer));
    let (counts, mut pinholes) = (counter(&lab), Pinholes::of(&lab));
    let (mut failed, mut tried) = (Vec::new(), 0);
    let tcp = if target == Who::Node { HTTP } else { WEB };
    for (number, shape) in all().iter().enumerate() {
        let port = if shape.protocol == UDP { ECHO } else { tcp };
        for sender in [Sender::Stranger, Sender::Peer, Sender::Pinhole] {
            if sender == Sender::Pinhole && shape.protocol != TCP {
                continue;
            }
            let (who, wire) = if sender == Sender::Peer { (Who::Peer, &peer) } else { (Who::Stranger, &stranger) };
            // A port of its own for each: answers that come again are told apart.
            let own = 20_000 + 4 * number as u16 + sender as u16;
            let flow = Flow { from: SocketAddr::new(silent(who, shape.v6), own), to: target.at(shape.v6, port) };
            if sender == Sender::Pinhole {
                pinholes.open(flow_of(shape, flow));
            }
            tried += 1;
            failed.extend(check(shape, sender, flow, wire, &counts).err().map(|error| format!("{error:#}")));
            pinholes.close(flow_of(shape, flow));
        }
    }
    println!(
        "shapes: {} shapes to {target:?}, {tried} attempts of a stranger, a peer and on a pinhole, {} not as expected",
        all().len(),
        failed.len()
    );
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn every_shape_to_the_node() {
    every_shape(Who::Node);
}

#[test]
fn every_shape_to_a_pod() {
    every_shape(Who::Pod);
}
