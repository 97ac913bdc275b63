//! Owns the meaning of a policy: the document, its diagnostics, the ruleset, the judgement on a dial, and the kernel's tables as data.
//! Called by the daemon, by the command line and by the fuzz targets.
//! Must never need a kernel, a runtime or a network: this crate builds and tests with cargo alone.
//!
//! Reading order: `policy_file` -> `document` (strict, with positions) -> `parse` (strict values) -> `compile` -> `ruleset` -> `tables` (the
//! content of the kernel's tables; `host` runs `decide` on it). Also: `diagnostic` (findings with a position), `node_facts` (the node that a
//! document is compiled for), `authorize` (may this address be dialled?), with `refusal`, `special` and `pin`; `visible` (how text of others is
//! shown).
//!
//! Compiling a document and authorizing a dial:
//!
//! ```
//! use guard_policy::{
//!     authorize::authorize, compile::compile, diagnostic::Source, node_facts::NodeFacts, refusal::Refusal,
//! };
//!
//! let text = "
//! apiVersion: nodeguard.dev/v1alpha1
//! kind: NodeGuardPolicy
//! metadata: {name: worker}
//! spec:
//!   mode: Enforce
//!   guard:
//!     - name: kubelet
//!       node: {ports: [10250]}
//!       allow: [tunnel: {}, ipBlock: {cidr: 10.0.8.0/24}]
//!   tunnel:
//!     dial: [node: {ports: [10250]}]
//! ";
//! let source = Source { path: "policy.yaml".into(), text: text.to_owned() };
//! let node = NodeFacts { addresses: vec!["10.0.0.7".parse()?], ..NodeFacts::default() };
//! let (ruleset, warnings) = compile(&source, &node).map_err(|findings| source.render(&findings, false))?;
//! assert!(warnings.is_empty());
//!
//! let permit = authorize(Some(&ruleset), &node, "10.0.0.7:10250".parse()?).unwrap();
//! assert_eq!(permit.rule(), "tunnel.dial[0]");
//! let refused = authorize(Some(&ruleset), &node, "10.0.0.7:22".parse()?);
//! assert_eq!(refused, Err(Refusal::PortNotNamed));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Deciding about a packet on the host, with the same code as the kernel:
//!
//! ```
//! use guard_common::{
//!     Listener, Namespace, Reason, Verdict,
//!     abi::{Generation, PeerKey4, PeerValue, PortKey, PortValue, ScopeValue, list_bytes, port_word},
//!     decide,
//!     packet::TCP,
//! };
//! use guard_policy::tables::{host::Model, image::Image};
//!
//! // Epoch 1, whose entries belong to generation 1: port 10250 of the node is guarded, and 10.0.8.0/24 is admitted.
//! let mut image = Image { epoch: 1, ..Image::default() };
//! let (port, peers) = (PortKey { scope: ScopeValue::NODE, port: 10250, protocol: TCP, generation: 1 }, PortValue::default());
//! let (word, bit) = port_word(1, 10250);
//! let network = PeerKey4 { list: list_bytes(1, peers.list), address: [10, 0, 8, 0] };
//! image.entries.ports.insert(port, peers);
//! image.entries.ports_copy.insert(port, peers);
//! image.entries.port_numbers.insert(word, bit);
//! image.entries.peers_v4.insert((32 + 24, network), PeerValue { kind: PeerValue::ALLOW, ..PeerValue::default() });
//! image.entries.followed.generations.insert(1, Generation { epoch: 1, ..Generation::default() });
//!
//! // The start of a TCP packet to 10.0.0.7:10250: an IPv4 header and the two ports.
//! let packet = |source: [u8; 4]| {
//!     let mut bytes = [0; 40];
//!     (bytes[0], bytes[9]) = (0x45, TCP);
//!     bytes[12..16].copy_from_slice(&source);
//!     bytes[16..20].copy_from_slice(&[10, 0, 0, 7]);
//!     bytes[20..22].copy_from_slice(&40_000u16.to_be_bytes());
//!     bytes[22..24].copy_from_slice(&10_250u16.to_be_bytes());
//!     bytes
//! };
//! let listener = Listener::of_node(10250, TCP);
//! let in_force = image.in_force();
//! let tables = Model { image, ..Model::default() };
//! let peer = decide(packet([10, 0, 8, 1]).as_slice(), listener, || false, &in_force, &tables);
//! assert_eq!(peer.verdict, Verdict::Allow);
//! let stranger = decide(packet([10, 0, 9, 1]).as_slice(), listener, || false, &in_force, &tables);
//! assert_eq!((stranger.verdict, stranger.reason), (Verdict::Deny, Reason::NoSelector));
//! ```

pub mod authorize;
pub mod compile;
pub mod diagnostic;
pub mod document;
pub mod node_facts;
mod parse;
pub mod pin;
pub mod policy_file;
pub mod refusal;
pub mod ruleset;
pub mod special;
pub mod tables;
pub mod visible;
mod yaml_error;
