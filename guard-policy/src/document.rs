//! Owns the policy document as written: strict decoding of YAML, each value with its position.
//! Called by `compile`.
//! Must never accept what it does not know: an unknown field, a second document or a duplicate key is an error.

use std::ops::Range;

use serde::Deserialize;
use serde_saphyr::Spanned;

use crate::{
    diagnostic::{Diagnostic, Source},
    yaml_error::{YamlError, describe},
};

/// A whole document.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    /// `nodeguard.dev/v1alpha1`.
    pub api_version: Spanned<String>,
    /// `NodeGuardPolicy`.
    pub kind: Spanned<String>,
    /// The name of the policy.
    pub metadata: Metadata,
    /// What the policy guards and allows.
    pub spec: Spec,
}

/// `metadata`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// The name of the policy in `status` and in the log.
    pub name: Spanned<String>,
}

/// `spec`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// `Enforce` or `Audit`.
    pub mode: Spanned<String>,
    /// The rules. A port that no rule names is not guarded.
    pub guard: Vec<GuardSpec>,
    /// What the control plane may dial through the tunnel.
    pub tunnel: TunnelSpec,
    /// The hub rule: what this node may reach of the control plane.
    pub control_plane: Option<ControlPlaneSpec>,
    /// The edge tier: early drops on the uplinks.
    pub edge: Option<EdgeSpec>,
}

/// `spec.edge`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeSpec {
    /// The uplinks on which the opening packets of strangers are dropped before the network stack.
    pub interfaces: Spanned<Vec<Spanned<String>>>,
}

/// An entry of `spec.guard`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardSpec {
    /// The name of the rule, unique in the document.
    pub name: Spanned<String>,
    /// `Audit` for this rule only.
    pub mode: Option<Spanned<String>>,
    /// Ports of the node itself.
    pub node: Option<NodePorts>,
    /// Ports of pods.
    pub pods: Option<PodPorts>,
    /// Who may reach the ports; an empty list admits nobody.
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
    /// Prefixes of pod addresses on this node. Without them the rule applies to every pod, identified by its cgroup.
    pub cidrs: Option<Spanned<Vec<Spanned<String>>>>,
    /// The cgroup of the pods, if it is not one of the usual ones.
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
    /// A local process, identified by its cgroup.
    pub caller: Option<Spanned<CallerSpec>>,
    /// Source addresses.
    pub ip_block: Option<Spanned<IpBlock>>,
}

/// `{cgroup}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallerSpec {
    /// The path of a cgroup below the guarded one. It matches processes in this cgroup and below it.
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
    /// The source addresses that are admitted.
    pub cidr: Spanned<String>,
    /// Prefixes inside `cidr` that are not admitted.
    #[serde(default)]
    pub except: Vec<Spanned<String>>,
}

/// `spec.tunnel`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TunnelSpec {
    /// What the control plane may dial; with an empty list it may dial nothing.
    pub dial: Vec<DialSpec>,
    /// An upstream agent that runs beside the guard. Its connections count as `tunnel`.
    pub companion: Option<CompanionSpec>,
    /// The cluster's service range. `pods` never matches an address in it.
    pub service_cidrs: Option<Spanned<Vec<Spanned<String>>>>,
}

/// `tunnel.companion`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompanionSpec {
    /// The cgroup that the agent runs in.
    pub cgroup: Spanned<String>,
    /// What the agent may reach in addition to the destinations of `dial`: its proxy-servers and its name server.
    pub servers: Spanned<Vec<ServerSpec>>,
}

/// An entry of `companion.servers`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerSpec {
    /// The addresses of the server.
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
    /// The addresses of the control plane.
    pub addresses: Spanned<Vec<Spanned<String>>>,
    /// The TCP ports that this node and its pods may reach at these addresses; every other port is denied.
    pub ports: Spanned<Vec<Spanned<String>>>,
}

/// An entry of `tunnel.dial`: one of `node`, `pods` and `services`, and the demands on the last hop.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DialSpec {
    /// Addresses of this node.
    pub node: Option<Spanned<NodePorts>>,
    /// Addresses of pods.
    pub pods: Option<Spanned<PodPorts>>,
    /// Addresses of Services, dialled without change.
    pub services: Option<Spanned<ServicePorts>>,
    /// `Required`: the first bytes from the control plane must be a TLS ClientHello.
    pub tls: Option<Spanned<String>>,
    /// What kubelet's serving certificate must satisfy before kubelet is dialled.
    pub certificate: Option<Spanned<CertificateSpec>>,
}

/// `services: {cidrs, ports, protocol}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePorts {
    /// Prefixes of Service addresses; the default is `tunnel.serviceCidrs`.
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
    /// The path of a PEM file with CA certificates.
    pub ca: Option<Spanned<String>>,
    /// The name or address that the certificate must be valid for; the default is the dialled address.
    pub name: Option<Spanned<String>>,
    /// Hashes of public keys. The certificate's public key must match one of them.
    #[serde(default)]
    pub pins: Vec<Spanned<String>>,
}

/// Decodes a document. If that fails, the text is decoded once more without types, so that broken syntax is not reported as a missing field.
pub fn decode(source: &Source) -> Result<Document, Vec<Diagnostic>> {
    let options = || {
        let mut options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
        // A policy with 100,000 prefixes has 600,000 nodes. No policy needs aliases.
        options.budget =
            serde_saphyr::budget! { max_events: 4_000_000, max_nodes: 2_000_000, max_aliases: 64, max_anchors: 64 };
        options
    };
    serde_saphyr::from_str_with_options(&source.text, options()).map_err(|error| {
        let untyped = serde_saphyr::from_str_with_options::<serde_json::Value>(&source.text, options());
        vec![match untyped {
            Err(error) => finding(source, "NG002", "not valid YAML", &error),
            Ok(_) => finding(source, "NG003", "not a NodeGuardPolicy", &error),
        }]
    })
}

/// The byte range of a value in the text.
pub fn span<T>(value: &Spanned<T>) -> Range<usize> {
    let span = value.referenced.span();
    let start = span.byte_offset().unwrap_or(0) as usize;
    start..start + span.byte_len().unwrap_or(0) as usize
}

fn finding(source: &Source, id: &'static str, what: &str, error: &serde_saphyr::Error) -> Diagnostic {
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
    let YamlError { message, label } = describe(error, &source.text, &span);
    Diagnostic::error(id, span, format!("{what}: {message}"), label)
        .help("docs/policy.md describes every field; `nodeguard check FILE` checks a file without applying it")
}
