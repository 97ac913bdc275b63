//! Owns the policy document as it is written: strict decoding of YAML, every value with its place.
//! Called by `watch` and `check`, before `compile`.
//! Must never accept what it does not know: an unknown field, a second document or a duplicate key is an error.

use std::ops::Range;

use serde::Deserialize;
use serde_saphyr::{DefaultMessageFormatter, MessageFormatter, Spanned};

use crate::diagnostic::{Diagnostic, Source};

/// A whole document.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    /// `nodeguard.dev/v1alpha1`.
    pub api_version: Spanned<String>,
    /// `NodeGuardPolicy`.
    pub kind: Spanned<String>,
    /// The name.
    pub metadata: Metadata,
    /// The policy.
    pub spec: Spec,
}

/// `metadata`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// How `status` and logs call the policy.
    pub name: Spanned<String>,
}

/// `spec`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// `Enforce` or `Audit`.
    pub mode: Spanned<String>,
    /// The rules.
    pub guard: Vec<GuardSpec>,
    /// The tunnel.
    pub tunnel: TunnelSpec,
    /// The hub rule.
    pub control_plane: Option<ControlPlaneSpec>,
    /// The edge tier.
    pub edge: Option<EdgeSpec>,
}

/// `spec.edge`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSpec {
    /// The uplinks on which strangers' opening packets are dropped before the stack.
    pub interfaces: Spanned<Vec<Spanned<String>>>,
}

/// An entry of `spec.guard`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardSpec {
    /// Unique in the document.
    pub name: Spanned<String>,
    /// `Audit` for this rule alone.
    pub mode: Option<Spanned<String>>,
    /// The node's ports.
    pub node: Option<NodePorts>,
    /// Pods' ports.
    pub pods: Option<PodPorts>,
    /// Who may reach them; empty admits nobody.
    pub allow: Spanned<Vec<Selector>>,
}

/// `node: {ports, protocol}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodePorts {
    /// Ports and ranges.
    pub ports: Spanned<Vec<Spanned<String>>>,
    /// `TCP` or `UDP`.
    pub protocol: Option<Spanned<String>>,
}

/// `pods: {cidrs, cgroup, ports, protocol}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodPorts {
    /// Prefixes of pod addresses on this node. Without them every pod is meant, by its cgroup.
    pub cidrs: Option<Spanned<Vec<Spanned<String>>>>,
    /// The cgroup that pods live in, where it is not one of the usual ones.
    pub cgroup: Option<Spanned<String>>,
    /// Ports and ranges.
    pub ports: Spanned<Vec<Spanned<String>>>,
    /// `TCP` or `UDP`.
    pub protocol: Option<Spanned<String>>,
}

/// An entry of `allow`: exactly one of its fields.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Control-plane connections that came through the tunnel.
    pub tunnel: Option<Spanned<Empty>>,
    /// Connections opened in this node's own network namespace.
    pub node: Option<Spanned<Empty>>,
    /// A local process, by its cgroup.
    pub caller: Option<Spanned<CallerSpec>>,
    /// Source addresses.
    pub ip_block: Option<Spanned<IpBlock>>,
}

/// `{cgroup}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallerSpec {
    /// The path of a cgroup below the guarded one: processes in it and below it are meant.
    pub cgroup: Spanned<String>,
}

/// `{}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

/// `{cidr, except}`, as in a NetworkPolicy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IpBlock {
    /// Who.
    pub cidr: Spanned<String>,
    /// But not these, inside `cidr`.
    #[serde(default)]
    pub except: Vec<Spanned<String>>,
}

/// `spec.tunnel`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TunnelSpec {
    /// Where the control plane may go; empty is nowhere.
    pub dial: Vec<DialSpec>,
    /// An upstream agent beside the guard, whose connections count as the tunnel's.
    pub companion: Option<CompanionSpec>,
    /// The cluster's service range: addresses in it are no pods'.
    pub service_cidrs: Option<Spanned<Vec<Spanned<String>>>>,
}

/// `tunnel.companion`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompanionSpec {
    /// The cgroup that it runs in.
    pub cgroup: Spanned<String>,
    /// What it may reach beside the destinations of `dial`: its servers, its name server.
    pub servers: Spanned<Vec<ServerSpec>>,
}

/// An entry of `companion.servers`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerSpec {
    /// Where.
    pub cidr: Spanned<String>,
    /// Ports and ranges.
    pub ports: Spanned<Vec<Spanned<String>>>,
    /// `TCP` or `UDP`.
    pub protocol: Option<Spanned<String>>,
}

/// `spec.controlPlane`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlPlaneSpec {
    /// Addresses of the control plane.
    pub addresses: Spanned<Vec<Spanned<String>>>,
    /// The TCP ports that this node and its pods may reach there; all others are denied.
    pub ports: Spanned<Vec<Spanned<String>>>,
}

/// An entry of `tunnel.dial`: one of `node`, `pods` and `services`, and what is asked of the last hop.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DialSpec {
    /// The node's own addresses.
    pub node: Option<Spanned<NodePorts>>,
    /// Pods' addresses.
    pub pods: Option<Spanned<PodPorts>>,
    /// Services' addresses, dialled as they are.
    pub services: Option<Spanned<ServicePorts>>,
    /// `Required`: what the control plane sends first must be a TLS ClientHello.
    pub tls: Option<Spanned<String>>,
    /// What kubelet's serving certificate must hold before a dial to it is made.
    pub certificate: Option<Spanned<CertificateSpec>>,
}

/// `services: {cidrs, ports, protocol}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePorts {
    /// Prefixes of Services' addresses; without them, `tunnel.serviceCidrs`.
    pub cidrs: Option<Spanned<Vec<Spanned<String>>>>,
    /// Ports and ranges of the Services.
    pub ports: Spanned<Vec<Spanned<String>>>,
    /// `TCP`.
    pub protocol: Option<Spanned<String>>,
}

/// `{ca, name, pins}` of an entry of `tunnel.dial`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateSpec {
    /// A PEM file of CA certificates.
    pub ca: Option<Spanned<String>>,
    /// The name or address that the certificate must be for, where it is not the dialled one.
    pub name: Option<Spanned<String>>,
    /// Hashes of public keys, one of which must be the certificate's.
    #[serde(default)]
    pub pins: Vec<Spanned<String>>,
}

/// Decodes a document. One that fails is read once more without types, so that a wrong indent is told as such and not as a missing field.
pub fn decode(source: &Source) -> Result<Document, Vec<Diagnostic>> {
    let options = || {
        let mut options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
        // A policy with 100,000 prefixes is 600,000 nodes; aliases are not needed at all.
        options.budget =
            serde_saphyr::budget! { max_events: 4_000_000, max_nodes: 2_000_000, max_aliases: 64, max_anchors: 64 };
        options
    };
    serde_saphyr::from_str_with_options(&source.text, options()).map_err(|error| {
        let untyped = serde_saphyr::from_str_with_options::<serde_json::Value>(&source.text, options());
        vec![match untyped {
            Err(error) => finding(source, "NG002", &error),
            Ok(_) => finding(source, "NG003", &error),
        }]
    })
}

/// The bytes that a value was written with.
pub fn span<T>(value: &Spanned<T>) -> Range<usize> {
    let span = value.referenced.span();
    let start = span.byte_offset().unwrap_or(0) as usize;
    start..start + span.byte_len().unwrap_or(0) as usize
}

fn finding(source: &Source, id: &'static str, error: &serde_saphyr::Error) -> Diagnostic {
    let message = DefaultMessageFormatter.format_message(error).into_owned();
    let span = error.location().map_or(source.text.len()..source.text.len(), |location| {
        let span = location.span();
        match (span.byte_offset(), span.byte_len()) {
            (Some(start), Some(length)) => start as usize..(start + length) as usize,
            _ => {
                let line = source
                    .text
                    .lines()
                    .take((location.line() as usize).saturating_sub(1))
                    .map(|line| line.len() + 1)
                    .sum::<usize>();
                line + location.column().saturating_sub(1) as usize..line + location.column() as usize
            }
        }
    });
    let what = if id == "NG002" { "not valid YAML" } else { "not a NodeGuardPolicy" };
    Diagnostic::error(id, span, format!("{what}: {message}"), "here")
        .help("docs/policy.md lists every field; `nodeguard check FILE` tries a document without applying it")
}
