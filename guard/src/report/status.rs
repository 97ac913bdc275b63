//! Owns what `nodeguard status` says: one snapshot, as JSON and as tables.
//! Called by `admin` (which serves the snapshot) and by the `status` command (which shows it).
//! Must never leave out what weakens protection: that comes first.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::{
    kernel::{
        links::{
            edge_hooks::EdgeLink,
            programs::{Attachment, PinnedMap},
        },
        observe::map_use::{MapUse, ProgramUse},
    },
    report::{dialling::Dialling, edge, table::Table, usage},
    sys::times::age,
};

/// Everything the guard knows of itself at one moment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Whether the daemon answered; without it, this is what the pinned maps say.
    pub daemon: bool,
    /// `Enforce` or `Audit`; empty where no policy is known.
    pub mode: String,
    /// The policy in force.
    pub policy: Policy,
    /// The programs and whether they hold.
    pub programs: Vec<Attachment>,
    /// How a listener's network namespace is told: `cookie` or `address`.
    pub namespace_by: String,
    /// The pinned maps.
    pub maps: Vec<PinnedMap>,
    /// The edge tier, an interface each.
    #[serde(default)]
    pub edge: Vec<EdgeLink>,
    /// How full the maps are.
    #[serde(default)]
    pub map_use: Vec<MapUse>,
    /// How long the programs ran, where the kernel measures it.
    #[serde(default)]
    pub program_use: Vec<ProgramUse>,
    /// The tunnel.
    pub tunnel: serde_json::Value,
    /// Packets to guarded ports, by rule and reason; zeros are left out of the tables, not of the JSON.
    pub counters: Vec<Counter>,
    /// What the kernel half could not do.
    pub health: Vec<Health>,
    /// How many open connections were cut because the policy in force no longer admits them.
    pub cut: u64,
    /// How many pins, links and tables were mended because somebody else removed or changed them.
    pub mended: u64,
    /// The last denials, the newest last.
    pub last_denies: Vec<serde_json::Value>,
    /// The last refused dials, the newest last.
    pub last_refused_dials: Vec<serde_json::Value>,
    /// Dials by outcome.
    pub dials: serde_json::Value,
    /// Dials by outcome, reason, size and time; the audit file; checked certificates.
    #[serde(default)]
    pub dialling: Dialling,
    /// What weakens protection right now, a sentence each.
    pub weakened: Vec<String>,
}

/// The policy in force.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// `metadata.name`.
    pub name: String,
    /// The file.
    pub path: String,
    /// SHA-256 of the document.
    pub digest: String,
    /// The epoch in force; 0 means none.
    pub epoch: u32,
    /// RFC 3339: when it came into force.
    pub since: Option<String>,
    /// The rules.
    pub rules: Vec<Rule>,
    /// Why the last edit was rejected, if it was.
    pub last_error: Option<String>,
}

/// A rule as people see it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Rule {
    /// Its name.
    pub name: String,
    /// `Enforce` or `Audit`.
    pub mode: String,
    /// What it guards.
    pub guards: String,
    /// Who it allows.
    pub allows: String,
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// The rule; `-` for packets that reached none.
    pub rule: String,
    /// The reason.
    pub reason: String,
    /// `Allow` or `Deny`; what happened, not what would have.
    pub verdict: String,
    /// Whether a denial was only counted.
    pub audited: bool,
    /// Packets.
    pub packets: u64,
}

/// A loss counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// What was lost.
    pub name: String,
    /// How many.
    pub count: u64,
}

impl Status {
    /// Writes the tables.
    pub fn render(&self, out: &mut dyn Write) -> io::Result<()> {
        for line in &self.weakened {
            writeln!(out, "WEAKENED: {line}")?;
        }
        self.render_summary(out)?;
        self.render_programs(out)?;
        edge::render(&self.edge, out)?;
        usage::render(&self.map_use, &self.program_use, out)?;
        self.render_tunnel(out)?;
        self.render_rules(out)?;
        self.render_counters(out)?;
        render_events(
            out,
            "LAST DENIALS",
            &self.last_denies,
            &["time", "source", "destination", "port", "rule", "reason"],
        )?;
        render_events(out, "LAST REFUSED DIALS", &self.last_refused_dials, &["time", "requested", "reason", "message"])
    }

    fn render_summary(&self, out: &mut dyn Write) -> io::Result<()> {
        let held = self.programs.iter().filter(|program| program.attached).count();
        let holding = if held == self.programs.len() && held > 0 && self.policy.epoch > 0 { "yes" } else { "NO" };
        writeln!(
            out,
            "Daemon:     {}",
            if self.daemon { "running" } else { "not running (this is what the pinned maps say)" }
        )?;
        writeln!(
            out,
            "Holding:    {holding} ({held} of {} programs attached, epoch {})",
            self.programs.len(),
            self.policy.epoch
        )?;
        if !self.mode.is_empty() {
            let Policy { name, path, digest, since, .. } = &self.policy;
            let since = since.as_deref().map(age).unwrap_or_default();
            writeln!(
                out,
                "Policy:     {name} ({}, {path}, sha256 {}), in force for {since}",
                self.mode,
                digest.get(..12).unwrap_or(digest)
            )?;
        }
        if let Some(error) = &self.policy.last_error {
            writeln!(out, "Last edit:  rejected\n{error}")?;
        }
        Ok(())
    }

    fn render_programs(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Table::new(&["PROGRAM", "ATTACHED", "LINK", "ID"]);
        let number = |id: Option<u32>| id.map_or_else(|| "-".to_owned(), |id| id.to_string());
        for Attachment { name, attached, link_id, program_id } in &self.programs {
            let attached = if *attached { "yes" } else { "NO" };
            table.row([name.clone(), attached.to_owned(), number(*link_id), number(*program_id)]);
        }
        table.write(out)
    }

    fn render_tunnel(&self, out: &mut dyn Write) -> io::Result<()> {
        let text = |value: &serde_json::Value| match value.as_str() {
            Some(text) => text.to_owned(),
            None if value.is_null() => "-".to_owned(),
            None => value.to_string(),
        };
        let streams = self.tunnel.get("streams").and_then(serde_json::Value::as_array).cloned().unwrap_or_default();
        if !self.daemon {
            return Ok(());
        }
        let mut table = Table::new(&["TUNNEL", "SERVER-ID", "STATE", "AGE", "DIALS", "TLS", "LAST ERROR"]);
        for stream in &streams {
            let field = |name: &str| stream.get(name).map_or_else(|| "-".to_owned(), text);
            let since =
                stream.get("since").and_then(serde_json::Value::as_str).map(age).unwrap_or_else(|| "-".to_owned());
            table.row([
                field("server"),
                field("serverId"),
                field("state"),
                since,
                field("dials"),
                field("tls"),
                field("lastError"),
            ]);
        }
        table.write(out)?;
        if let Some(identifiers) = self.tunnel.get("identifiers").and_then(serde_json::Value::as_str) {
            writeln!(out, "\nAdvertised: {}", advertised(identifiers))?;
        }
        let dial = |name: &str| self.dials.get(name).map_or_else(|| "-".to_owned(), text);
        writeln!(out, "Dials:      {} admitted, {} refused, {} open", dial("admitted"), dial("refused"), dial("open"))?;
        self.dialling.services.iter().try_for_each(|services| services.render(out))
    }

    fn render_rules(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Table::new(&["RULE", "MODE", "GUARDS", "ALLOWS"]);
        for Rule { name, mode, guards, allows } in &self.policy.rules {
            table.row([name.clone(), mode.clone(), guards.clone(), allows.clone()]);
        }
        table.write(out)
    }

    fn render_counters(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Table::new(&["RULE", "VERDICT", "REASON", "PACKETS"]);
        for counter in self.counters.iter().filter(|counter| counter.packets > 0) {
            let verdict = if counter.audited { "Allow (audit)" } else { counter.verdict.as_str() };
            table.row([counter.rule.clone(), verdict.to_owned(), counter.reason.clone(), counter.packets.to_string()]);
        }
        table.write(out)?;
        for Health { name, count } in self.health.iter().filter(|health| health.count > 0) {
            writeln!(out, "{name}: {count}")?;
        }
        if self.cut > 0 {
            writeln!(out, "cut: {} open connections that the policy in force does not admit", self.cut)?;
        }
        if self.mended > 0 {
            writeln!(out, "mended: {} (somebody removed or changed what is pinned; the log says what)", self.mended)?;
        }
        Ok(())
    }
}

/// What the servers are told of this node: the first of it, and how much more there is.
fn advertised(identifiers: &str) -> String {
    const SHOWN: usize = 8;
    let all: Vec<&str> = identifiers.split('&').filter(|each| !each.is_empty()).collect();
    let shown = all.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    match all.len() {
        0 => "nothing".to_owned(),
        count if count > SHOWN => format!("{shown}, and {} more", count - SHOWN),
        _ => shown,
    }
}

/// The newest ten of a list of events, as a table.
fn render_events(out: &mut dyn Write, title: &str, events: &[serde_json::Value], fields: &[&str]) -> io::Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{title}")?;
    let titles: Vec<String> = fields.iter().map(|field| field.to_uppercase()).collect();
    let mut table = Table::bare(&titles.iter().map(String::as_str).collect::<Vec<_>>());
    for event in events.iter().rev().take(10).rev() {
        let field = |name: &&str| match event.get(*name) {
            Some(serde_json::Value::String(text)) => text.clone(),
            None | Some(serde_json::Value::Null) => "-".to_owned(),
            Some(other) => other.to_string(),
        };
        table.row(fields.iter().map(field).collect::<Vec<_>>());
    }
    table.write(out)
}
