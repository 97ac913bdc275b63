//! A policy file of an operator: it is accepted as a whole, or rejected with an error. A dial to a link-local address is permitted only if a
//! rule names that address exactly.
#![cfg_attr(not(test), no_main)]

use std::net::{Ipv4Addr, SocketAddr};

use guard_policy::{
    authorize::authorize,
    compile::compile,
    diagnostic::{Severity, Source},
    node_facts::NodeFacts,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let node = NodeFacts { addresses: vec![Ipv4Addr::new(10, 0, 0, 7).into()], names: Vec::new(), service_host: None };
    let source = Source { path: "policy.yaml".into(), text: text.to_owned() };
    match compile(&source, &node) {
        Ok((ruleset, warnings)) => {
            assert!(warnings.iter().all(|finding| finding.severity == Severity::Warning));
            let metadata = SocketAddr::from(([169, 254, 169, 254], 80));
            if let Ok(permit) = authorize(Some(&ruleset), &node, metadata) {
                assert!(ruleset.dial.iter().any(|rule| rule.names_exactly(permit.address().ip())));
            }
        }
        Err(findings) => {
            assert!(findings.iter().any(|finding| finding.severity == Severity::Error));
            assert!(!source.render(&findings, false).is_empty());
        }
    }
});
