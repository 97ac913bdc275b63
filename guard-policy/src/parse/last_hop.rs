//! Owns parsing the demands of an entry of `tunnel.dial` on the last hop: `tls` and `certificate`.
//! Called by `rules`.
//! Must never accept a demand without effect: a `certificate` that checks nothing is an error.

use std::{path::Path, sync::Arc};

use rustls_pki_types::ServerName;
use serde_saphyr::Spanned;

use crate::{
    diagnostic::Diagnostic,
    document::{CertificateSpec, span},
    parse::scalars::Findings,
    pin::Pin,
    ruleset::{CertificateDemand, DialTarget},
};

/// `Required` is the only value.
pub(crate) fn tls(text: &Spanned<String>, findings: &mut Findings) -> bool {
    if text.value != "Required" {
        let message = format!("unknown value `{}` for `tls`", text.value);
        findings.add(Diagnostic::error("NG030", span(text), message, "write `Required`, or remove `tls`"));
    }
    true
}

pub(crate) fn certificate(
    written: &Spanned<CertificateSpec>,
    target: &DialTarget,
    findings: &mut Findings,
) -> Option<Arc<CertificateDemand>> {
    let CertificateSpec { ca, name, pins } = &written.value;
    let mut wrong = |place, message: String, label: &str| {
        findings.add(Diagnostic::error("NG031", place, message, label));
    };
    if *target != DialTarget::Node {
        wrong(
            span(written),
            "only the certificate of this node's kubelet can be checked".to_owned(),
            "move it to an entry with `node`, or use `tls: Required` for pods",
        );
    }
    if ca.is_none() && pins.is_empty() {
        wrong(span(written), "`certificate` checks nothing".to_owned(), "add `ca`, `pins` or both");
    }
    if let Some(ca) = ca.as_ref().filter(|ca| !Path::new(&ca.value).is_absolute()) {
        wrong(
            span(ca),
            format!("`{}` is not an absolute path", ca.value),
            "as in `/etc/kubernetes/pki/kubelet-ca.crt`",
        );
    }
    if let Some(name) = name {
        if ca.is_none() {
            wrong(
                span(name),
                "`name` without `ca` proves nothing".to_owned(),
                "anyone can write this name in a certificate; add `ca`",
            );
        } else if ServerName::try_from(name.value.as_str()).is_err() {
            wrong(span(name), format!("`{}` is neither a DNS name nor an address", name.value), "as in `node-1`");
        }
    }
    let mut parsed = Vec::new();
    for text in pins {
        match text.value.parse::<Pin>() {
            Ok(pin) => parsed.push(pin),
            Err(error) => wrong(
                span(text),
                error.to_string(),
                "docs/konnectivity.md shows how to compute the pin of a public key",
            ),
        }
    }
    parsed.sort_unstable();
    parsed.dedup();
    let (ca, name) = (ca.as_ref().map(|ca| ca.value.clone().into()), name.as_ref().map(|name| name.value.clone()));
    Some(Arc::new(CertificateDemand { ca, name, pins: parsed }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compile::compile, diagnostic::Source, node_facts::NodeFacts, ruleset::Ruleset};

    fn compiled(dial: &str) -> Result<Ruleset, Vec<&'static str>> {
        let text = format!(
            "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: t}}\nspec: {{mode: Enforce, guard: [], tunnel: {{dial: [{dial}]}}}}\n"
        );
        let compiled = compile(&Source { path: "t".into(), text }, &NodeFacts::default());
        compiled.map(|(ruleset, _)| ruleset).map_err(|found| found.iter().map(|finding| finding.id).collect())
    }

    #[test]
    fn what_is_asked_of_the_last_hop_is_read_strictly() {
        let pin = format!("sha256/{}=", "A".repeat(43));
        let entry = |more: &str| format!("{{node: {{ports: [10250]}}, {more}}}");
        let good =
            compiled(&entry(&format!("tls: Required, certificate: {{ca: /ca.crt, name: node-1, pins: ['{pin}']}}")));
        let demands = &good.unwrap().dial[0].demands;
        let demand = CertificateDemand {
            ca: Some("/ca.crt".into()),
            name: Some("node-1".into()),
            pins: vec![pin.parse().unwrap()],
        };
        assert!(demands.tls);
        assert_eq!(demands.certificates, [Arc::new(demand)]);
        for (wrong, id) in [
            (entry("tls: required"), "NG030"),
            (entry("tls: Optional"), "NG030"),
            (entry("certificate: {}"), "NG031"),
            (entry("certificate: {pins: []}"), "NG031"),
            (entry("certificate: {ca: ca.crt}"), "NG031"),
            (entry("certificate: {ca: /ca.crt, name: 'a b'}"), "NG031"),
            (entry(&format!("certificate: {{name: node-1, pins: ['{pin}']}}")), "NG031"),
            (entry(&format!("certificate: {{pins: ['{pin}A']}}")), "NG031"),
            (entry("certificate: {pins: ['sha256:xy']}"), "NG031"),
            (entry("certificate: {ca: /ca.crt, chain: true}"), "NG003"),
            ("{pods: {cidrs: [10.0.0.0/8], ports: [1]}, certificate: {ca: /ca.crt}}".to_owned(), "NG031"),
        ] {
            assert_eq!(compiled(&wrong).unwrap_err(), [id], "{wrong}");
        }
        let pods = compiled("{pods: {cidrs: [10.0.0.0/8], ports: [1]}, tls: Required}").unwrap();
        assert!(pods.dial[0].demands.tls);
    }
}
