//! A document of an operator's: it is taken whole or refused with an error that has a place; what it dials is never link-local by a prefix.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nodeguard::{
    authorize::authorize,
    node::NodeFacts,
    policy::{
        compile::compile,
        diagnostic::{Severity, Source},
    },
};

fuzz_target!(|text: &str| {
    let node = NodeFacts { addresses: vec!["10.0.0.7".parse().expect("an address")], names: Vec::new() };
    let source = Source { path: "policy.yaml".into(), text: text.to_owned() };
    match compile(&source, &node) {
        Ok((ruleset, warnings)) => {
            assert!(warnings.iter().all(|finding| finding.severity == Severity::Warning));
            let metadata = "169.254.169.254:80".parse().expect("an address");
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
