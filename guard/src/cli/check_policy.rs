//! Owns `nodeguard check`: tries a document without applying it.
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

use crate::{cli::args::Output, report::table::Table, sys::node_facts};

/// What a check found, as data.
#[derive(serde::Serialize)]
struct Report {
    ok: bool,
    findings: Vec<Finding>,
}

/// Checks a file; `false` where it has errors.
pub fn check(path: &Path, output: Output, colour: bool, out: &mut dyn Write) -> io::Result<bool> {
    let node = node_facts::read(&[]).unwrap_or_default();
    let loaded = load(path, &node);
    let (source, diagnostics) = match &loaded {
        Ok(loaded) => (&loaded.source, &loaded.warnings),
        Err(rejected) => (&rejected.source, &rejected.diagnostics),
    };
    let ok = loaded.is_ok();
    if output == Output::Json {
        let report = Report { ok, findings: source.findings(diagnostics) };
        serde_json::to_writer_pretty(&mut *out, &report).map_err(io::Error::other)?;
        writeln!(out)?;
        return Ok(ok);
    }
    write!(out, "{}", source.render(diagnostics, colour))?;
    let count = |severity| diagnostics.iter().filter(|finding| finding.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    match &loaded {
        Err(_) => writeln!(out, "{}: {errors} errors, {warnings} warnings; it would not be taken", path.display())?,
        Ok(loaded) => {
            let ruleset = &loaded.ruleset;
            writeln!(
                out,
                "{}: policy `{}` ({:?}) is good, {warnings} warnings",
                path.display(),
                ruleset.name,
                ruleset.mode
            )?;
            let mut rules = Table::new(&["RULE", "MODE", "GUARDS", "ALLOWS"]);
            for rule in &ruleset.rules {
                rules.row([rule.name.clone(), format!("{:?}", rule.mode), rule.guards.clone(), rule.allows.clone()]);
            }
            rules.write(out)?;
        }
    }
    Ok(ok)
}
