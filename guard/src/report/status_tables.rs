//! Owns the tables of `nodeguard status`.
//! Called by the `status` command.
//! Must never leave out what weakens protection: that comes first. Must never write foreign text but by `lines` and `table`.

use std::io::{self, Write};

use guard_policy::ruleset::Mode;

use crate::{
    dial::connections::{DialCounts, RefusedDial},
    kernel::{
        links::{edge_hooks::EdgeLink, programs::Attachment},
        observe::{
            events::Denial,
            map_use::{MapUse, ProgramUse},
        },
    },
    report::{
        lines::{line, lines},
        status::{PolicyStatus, RuleStatus, Status},
        table::Table,
    },
    sys::times::age,
    tunnel::handle::StreamState,
};

/// How many events and identifiers are shown.
const EVENTS: usize = 10;
const IDENTIFIERS: usize = 8;

/// Writes everything.
pub fn write(status: &Status, out: &mut dyn Write) -> io::Result<()> {
    for weakness in &status.weakened {
        line(out, format_args!("WEAKENED: {}", weakness.message))?;
    }
    summary(status, out)?;
    programs(&status.programs, out)?;
    edge(&status.edge, out)?;
    map_use(&status.map_use, &status.program_use, out)?;
    tunnel(status, out)?;
    rules(&status.policy.rules, out)?;
    counters(status, out)?;
    denials(&status.last_denies, out)?;
    refused_dials(&status.last_refused_dials, out)
}

fn summary(status: &Status, out: &mut dyn Write) -> io::Result<()> {
    let Status { daemon, mode, policy, programs, .. } = status;
    let held = programs.iter().filter(|program| program.attached).count();
    let holding = if held == programs.len() && held > 0 && policy.epoch > 0 { "yes" } else { "NO" };
    let running = if *daemon { "running" } else { "not running (this is what the pinned maps say)" };
    line(out, format_args!("Daemon:     {running}"))?;
    let (all, epoch) = (programs.len(), policy.epoch);
    line(out, format_args!("Holding:    {holding} ({held} of {all} programs attached, epoch {epoch})"))?;
    if let Some(mode) = mode {
        let PolicyStatus { name, path, digest, since, .. } = policy;
        let since = since.as_deref().map(age).unwrap_or_default();
        let digest = digest.get(..12).unwrap_or(digest);
        line(out, format_args!("Policy:     {name} ({mode:?}, {path}, sha256 {digest}), in force for {since}"))?;
    }
    if let Some(error) = &policy.last_error {
        line(out, format_args!("Last edit:  rejected"))?;
        lines(out, error)?;
    }
    Ok(())
}

fn programs(programs: &[Attachment], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&["PROGRAM", "ATTACHED", "LINK", "ID"]);
    for Attachment { name, attached, link_id, program_id } in programs {
        table.row([name.clone(), yes(*attached), optional(*link_id), optional(*program_id)]);
    }
    table.write(out)
}

fn edge(links: &[EdgeLink], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&["EDGE", "ATTACHED", "HOOK", "LINK", "ID", "NOTE"]);
    for EdgeLink { interface, hook, attached, link_id, program_id, note } in links {
        let (link_id, program_id) = (optional(*link_id), optional(*program_id));
        table.row([interface.clone(), yes(*attached), hook.clone(), link_id, program_id, note.clone()]);
    }
    table.write(out)
}

fn map_use(maps: &[MapUse], programs: &[ProgramUse], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&["MAP", "ENTRIES", "CAPACITY", "USED"]);
    for map in maps {
        let MapUse { name, entries, capacity } = map;
        table.row([name.clone(), entries.to_string(), capacity.to_string(), format!("{}%", map.percent())]);
    }
    table.write(out)?;
    let mut table = Table::new(&["RAN", "RUNS", "SECONDS", "NS/RUN"]);
    for ProgramUse { name, runs, seconds } in programs {
        let each = seconds * 1e9 / (*runs).max(1) as f64;
        table.row([name.clone(), runs.to_string(), format!("{seconds:.3}"), format!("{each:.0}")]);
    }
    table.write(out)
}

fn tunnel(status: &Status, out: &mut dyn Write) -> io::Result<()> {
    let Some(tunnel) = &status.tunnel else { return Ok(()) };
    let mut table = Table::new(&["TUNNEL", "SERVER-ID", "STATE", "AGE", "DIALS", "TLS", "LAST ERROR"]);
    for StreamState { server, server_id, state, since, tls, dials, last_error, .. } in &tunnel.streams {
        let (id, tls, error) = (server_id.clone(), tls.clone(), last_error.clone());
        table.row([
            server.clone(),
            id.unwrap_or_default(),
            state.name().to_owned(),
            age(since),
            optional(*dials),
            tls.unwrap_or_default(),
            error.unwrap_or_default(),
        ]);
    }
    table.write(out)?;
    writeln!(out)?;
    line(out, format_args!("Advertised: {}", advertised(&tunnel.identifiers)))?;
    if let Some(dials) = &status.dials {
        let DialCounts { admitted, refused, open, .. } = dials;
        line(out, format_args!("Dials:      {admitted} admitted, {refused} refused, {open} open"))?;
    }
    if let Some(services) = &status.dialling.services {
        line(out, format_args!("Services:   {}", services.in_words()))?;
    }
    Ok(())
}

fn rules(rules: &[RuleStatus], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&["RULE", "MODE", "GUARDS", "ALLOWS"]);
    for RuleStatus { name, mode, guards, allows } in rules {
        let mode = mode.map(|mode: Mode| format!("{mode:?}")).unwrap_or_default();
        table.row([name.clone(), mode, guards.clone(), allows.clone()]);
    }
    table.write(out)
}

fn counters(status: &Status, out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&["RULE", "VERDICT", "REASON", "PACKETS"]);
    for counter in status.counters.iter().filter(|counter| counter.packets > 0) {
        let verdict = if counter.audited { "Allow (audit)" } else { &counter.verdict };
        table.row([
            counter.rule.clone(),
            verdict.to_owned(),
            counter.reason.clone().into_owned(),
            counter.packets.to_string(),
        ]);
    }
    table.write(out)?;
    for loss in status.health.iter().filter(|loss| loss.count > 0) {
        line(out, format_args!("{}: {}", loss.name, loss.count))?;
    }
    if status.cut > 0 {
        line(out, format_args!("cut: {} open connections that the policy in force denies", status.cut))?;
    }
    if status.mended > 0 {
        let mended = status.mended;
        line(
            out,
            format_args!(
                "mended: {mended} (something else removed or changed what is pinned; the log has the details)"
            ),
        )?;
    }
    Ok(())
}

fn denials(denials: &[Denial], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::bare(&["TIME", "SOURCE", "DESTINATION", "PORT", "RULE", "REASON"]);
    for Denial { time, source, destination, port, rule, reason, .. } in newest(denials) {
        table.row([
            time.clone(),
            source.to_string(),
            destination.to_string(),
            port.to_string(),
            rule.clone(),
            reason.clone().into_owned(),
        ]);
    }
    titled("LAST DENIALS", denials.is_empty(), &table, out)
}

fn refused_dials(dials: &[RefusedDial], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::bare(&["TIME", "REQUESTED", "REASON", "MESSAGE"]);
    for RefusedDial { time, requested, reason, message, .. } in newest(dials) {
        table.row([time.clone(), requested.clone(), reason.clone().into_owned(), message.clone()]);
    }
    titled("LAST REFUSED DIALS", dials.is_empty(), &table, out)
}

fn titled(title: &str, is_empty: bool, table: &Table, out: &mut dyn Write) -> io::Result<()> {
    if is_empty {
        return Ok(());
    }
    writeln!(out)?;
    line(out, format_args!("{title}"))?;
    table.write(out)
}

fn newest<T>(events: &[T]) -> &[T] {
    events.get(events.len().saturating_sub(EVENTS)..).unwrap_or_default()
}

fn yes(attached: bool) -> String {
    if attached { "yes" } else { "NO" }.to_owned()
}

fn optional(number: Option<impl ToString>) -> String {
    number.map(|number| number.to_string()).unwrap_or_default()
}

/// The identifiers that are advertised to the servers: the first ones, and the number of the others.
fn advertised(identifiers: &str) -> String {
    let all: Vec<&str> = identifiers.split('&').filter(|each| !each.is_empty()).collect();
    let shown = all.iter().take(IDENTIFIERS).copied().collect::<Vec<_>>().join(", ");
    match all.len() {
        0 => "nothing".to_owned(),
        count if count > IDENTIFIERS => format!("{shown}, and {} more", count - IDENTIFIERS),
        _ => shown,
    }
}

#[cfg(test)]
mod tests {
    use guard_policy::visible::acts;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_tables_say_shares_and_times() {
        let mut out = Vec::new();
        let map = MapUse { name: "PORTS".into(), entries: 7, capacity: 100 };
        let ran = ProgramUse { name: "guard_ingress".into(), runs: 1000, seconds: 0.0002 };
        map_use(&[map], &[ran], &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("PORTS   7         100        7%\n"), "{text}");
        assert!(text.contains("guard_ingress   1000   0.000     200\n"), "{text}");
    }

    /// A status in which everything that others can write is this text.
    fn written_by_others(text: &str) -> Status {
        fn replace(value: &mut serde_json::Value, text: &str) {
            match value {
                // The others are enums and addresses, or the reader would refuse them.
                serde_json::Value::Object(fields) => {
                    for (name, field) in fields {
                        let free = ["message", "requested", "lastError", "serverId", "server", "error", "name", "path"];
                        let free = free.contains(&name.as_str())
                            || ["rule", "guards", "allows", "note", "identifiers", "tls"].contains(&name.as_str());
                        if free && field.is_string() { *field = text.into() } else { replace(field, text) }
                    }
                }
                serde_json::Value::Array(values) => values.iter_mut().for_each(|value| replace(value, text)),
                serde_json::Value::Null
                | serde_json::Value::Bool(_)
                | serde_json::Value::Number(_)
                | serde_json::Value::String(_) => {}
            }
        }
        let mut status = crate::report::status::tests::running();
        status.policy.last_error = Some(text.to_owned());
        status.weakened = vec![crate::report::weakness::WeaknessReason::Uncut.says("m")];
        status.tunnel.as_mut().unwrap().streams[0].last_error = Some(String::new());
        let mut value = serde_json::to_value(&status).unwrap();
        replace(&mut value, text);
        serde_json::from_value(value).unwrap()
    }

    fn written(status: &Status) -> String {
        let mut out = Vec::new();
        write(status, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    proptest! {
        #[test]
        fn nothing_that_others_write_acts(text in "[\\PC\u{0}-\u{9f}\u{200b}-\u{206f}]{0,30}") {
            let shown = written(&written_by_others(&text));
            prop_assert!(!shown.chars().any(|character| acts(character) && character != '\n'), "{:?}", shown);
            // A line end of others is none of ours, except in the last edit, whose text is our own.
            let expected = written(&written_by_others("x")).lines().count() + text.matches('\n').count();
            prop_assert_eq!(shown.lines().count(), expected);
        }
    }
}
