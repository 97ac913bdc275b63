//! Owns `nodeguard check`: it checks a policy file without applying it.
//! Called by `main`.
//! Must never touch the kernel or a running daemon.

use std::{
    io::{self, Write},
    path::Path,
};

use guard_policy::{
    diagnostic::{Finding, Severity},
    policy_file::load,
};

use crate::{
    cli::args::Output,
    report::{
        lines::{json, line},
        table::Table,
    },
    sys::read_node_facts,
};

/// The result of a check in JSON.
#[derive(serde::Serialize)]
struct Report {
    ok: bool,
    findings: Vec<Finding>,
}

/// Checks a file and prints the findings. Returns whether the policy is valid.
pub fn check(path: &Path, output: Output, colour: bool, out: &mut dyn Write) -> io::Result<bool> {
    let node = read_node_facts::read(&[]).unwrap_or_default();
    let loaded = load(path, &node);
    let (source, diagnostics) = match &loaded {
        Ok(loaded) => (&loaded.source, &loaded.warnings),
        Err(rejected) => (&rejected.source, &rejected.diagnostics),
    };
    let ok = loaded.is_ok();
    if output == Output::Json {
        json(out, &Report { ok, findings: source.findings(diagnostics) })?;
        return Ok(ok);
    }
    // Findings are rendered in colour, and nothing else in them acts.
    write!(out, "{}", source.render(diagnostics, colour))?;
    let count = |severity| diagnostics.iter().filter(|finding| finding.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    let path = path.display();
    match &loaded {
        Err(_) => line(out, format_args!("{path}: {}; the policy would be rejected", counted(errors, "error")))?,
        Ok(loaded) => {
            let (name, mode) = (&loaded.ruleset.name, loaded.ruleset.mode);
            line(out, format_args!("{path}: policy `{name}` ({mode:?}) is valid, {}", counted(warnings, "warning")))?;
            let mut rules = Table::new(&["RULE", "MODE", "GUARDS", "ALLOWS"]);
            for rule in &loaded.ruleset.rules {
                rules.row([rule.name.clone(), format!("{:?}", rule.mode), rule.guards.clone(), rule.allows.clone()]);
            }
            rules.write(out)?;
        }
    }
    Ok(ok)
}

/// A number with its noun.
fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
