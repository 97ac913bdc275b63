//! Owns the main job as lines of a table: who, to what, by which way, what was expected, what became of it and why.
//! Called by the demo, and by the lab tests that hold the same bar.
//! Must never pass a line whose outcome was right by accident: the reason has to be the right one too.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nodeguard::report::status::Status;

use super::{
    KUBELET, Lab, POD_PORTS, POLICY,
    client::{Outcome, Stream, follow_log, http, https, tcp, through, upgraded_echo},
    daemon::Daemon,
    helper::LOG_LINES,
    net::Who,
};
use crate::{process::until, table::Table};

/// Makes every attempt of the main job.
pub fn main_job(lab: &mut Lab, table: &mut Table) -> Result<()> {
    for v6 in [false, true] {
        through_the_tunnel(lab, table, v6)?;
        directly(lab, table, v6)?;
        refused_dials(lab, table, v6)?;
    }
    local_processes(lab, table)
}

/// The lab's policy with `node: {}` for kubelet.
pub fn with_node_selector() -> String {
    POLICY.replacen("        - tunnel: {}\n", "        - tunnel: {}\n        - node: {}\n", 1)
}

/// What an attempt does.
type Attempt<'a> = &'a dyn Fn() -> Result<Outcome>;

fn through_the_tunnel(lab: &Lab, table: &mut Table, v6: bool) -> Result<()> {
    let kubelet = Who::Node.at(v6, KUBELET).to_string();
    let pod = Who::Pod.at(v6, POD_PORTS[0]).to_string();
    let ca = lab.certs.path("ca.crt");
    let stream =
        || -> Result<Box<dyn Stream>> { through(lab.server()?, &kubelet).map_err(|outcome| anyhow!("{outcome:?}")) };
    let attempts: [(&str, &str, Attempt<'_>); 4] = [
        (&kubelet, "/healthz", &|| lab.healthz_dialled(&kubelet)),
        (&kubelet, "log, streamed", &|| {
            let (count, over) = follow_log(stream()?, &ca)?;
            let as_written = count == LOG_LINES && over > Duration::from_millis(100);
            ensure!(as_written, "{count} lines over {over:?}: not as they were written");
            Ok(Outcome::Http(200))
        }),
        (&kubelet, "echo, upgraded", &|| upgraded_echo(stream()?, &ca).map(|_| Outcome::Http(200))),
        (&pod, "/", &|| Ok(http(through(lab.server()?, &pod), "/"))),
    ];
    for (to, what, attempt) in attempts {
        let to = format!("{to} {what}");
        judged(lab, table, ("control-plane", &to, "tunnel"), (Outcome::Http(200), "tunnel"), None, attempt)?;
    }
    Ok(())
}

fn directly(lab: &Lab, table: &mut Table, v6: bool) -> Result<()> {
    let kubelet = Who::Node.at(v6, KUBELET);
    let [guarded, open] = POD_PORTS.map(|port| Who::Pod.at(v6, port));
    let ca = lab.certs.path("ca.crt");
    for (who, to, expected, reason) in [
        (Who::Stranger, kubelet, Outcome::NoAnswer, "no-selector"),
        (Who::ControlPlane, kubelet, Outcome::NoAnswer, "no-selector"),
        (Who::Peer, kubelet, Outcome::Http(200), "ip-block"),
        (Who::Excepted, kubelet, Outcome::NoAnswer, "except"),
        (Who::Pod, kubelet, Outcome::NoAnswer, "no-selector"),
        (Who::Stranger, guarded, Outcome::NoAnswer, "no-selector"),
        (Who::Stranger, open, Outcome::Http(200), ""),
    ] {
        let event = (expected == Outcome::NoAnswer).then_some((who.at(v6, 0), to));
        let get = || Ok(if to == kubelet { https(tcp(to), "/healthz", &ca) } else { http(tcp(to), "/") });
        let line = (who.name(), &*to.to_string(), "direct");
        judged(lab, table, line, (expected, reason), event, &|| lab.net.run(who, get))?;
    }
    Ok(())
}

/// The denial's event says who, whom and why.
fn event_seen(lab: &Lab, from: SocketAddr, to: SocketAddr, reason: &str) -> Result<()> {
    until("the event", Duration::from_secs(2), || {
        Ok(status(lab)?.last_denies.iter().any(|event| {
            event.source.ip() == from.ip()
                && event.destination == to.ip()
                && event.port == to.port()
                && event.reason == reason
        }))
    })
}

fn refused_dials(lab: &Lab, table: &mut Table, v6: bool) -> Result<()> {
    let pod = Who::Pod.at(v6, POD_PORTS[1]).to_string();
    let node = Who::Node.at(v6, 22).to_string();
    let [metadata, loopback, peer] = if v6 {
        ["[fe80::1]:80", "[::1]:22", "[fd00:8::5]:80"]
    } else {
        ["169.254.169.254:80", "127.0.0.1:22", "10.0.8.5:80"]
    };
    let by_name = (!v6).then_some(("localhost:10250", "loopback"));
    let dials = [
        (metadata, "link-local"),
        (loopback, "loopback"),
        (&pod, "port-not-named"),
        (&node, "port-not-named"),
        (peer, "address-not-named"),
    ];
    for (to, reason) in dials.into_iter().chain(by_name) {
        let expected = format!("CONNECT 502, {reason}");
        table.check("control-plane", to, "tunnel", &expected, || refused_dial(lab, to, reason))?;
    }
    Ok(())
}

/// Dials what is refused: the answer, the status and the audit line say so, at once.
fn refused_dial(lab: &Lab, to: &str, reason: &str) -> Result<String> {
    let started = Instant::now();
    let outcome = through(lab.server()?, to).map_or_else(|outcome| outcome, |_| Outcome::Http(200));
    let took = started.elapsed();
    let Outcome::NotConnected(code, text) = &outcome else { return Ok(in_words(&outcome)) };
    ensure!(text.contains("nodeguard refuses"), "the answer to CONNECT is {text}");
    ensure!(took < Duration::from_secs(5), "refused after {took:?}");
    let refused = status(lab)?.last_refused_dials;
    let last = refused.last().filter(|dial| dial.requested == to).context("the status does not have it")?;
    let is_record = |line: &str| line.contains("dial refused") && line.contains(to) && line.contains(reason);
    ensure!(daemon(lab)?.printed().lines().any(is_record), "no audit line");
    Ok(format!("CONNECT {code}, {}", last.reason))
}

/// A process of the node that is not the guard: denied on loopback too, until the policy allows `node`.
fn local_processes(lab: &Lab, table: &mut Table) -> Result<()> {
    let ca = lab.certs.path("ca.crt").display().to_string();
    let mut from_node = |who: &str, expected: Outcome, reason: &str| {
        ["127.0.0.1:10250", "[::1]:10250", "10.0.0.2:10250", "[fd00::2]:10250"].iter().try_for_each(|to| {
            let get = || lab.ask(Who::Node, "", &["get", to, &ca]);
            judged(lab, table, (who, to, "direct"), (expected.clone(), reason), None, &get)
        })
    };
    from_node("local process", Outcome::NoAnswer, "no-selector")?;
    let epoch = status(lab)?.policy.epoch;
    lab.write_policy(&with_node_selector())?;
    daemon(lab)?.in_force_after(epoch)?;
    from_node("local, `node` allowed", Outcome::Http(200), "node")
}

/// Makes an attempt, and says what became of it and which one counter moved. A denial has its event: who, and whom.
fn judged(
    lab: &Lab,
    table: &mut Table,
    (who, to, way): (&str, &str, &str),
    (expected, reason): (Outcome, &str),
    event: Option<(SocketAddr, SocketAddr)>,
    attempt: Attempt<'_>,
) -> Result<()> {
    let because = |outcome: &Outcome, reason: &str| format!("{}, {reason}", in_words(outcome));
    table.check(who, to, way, because(&expected, reason).trim_end_matches(", "), || {
        let before = counters(lab)?;
        let outcome = attempt()?;
        let after = counters(lab)?;
        let moved = after.iter().filter(|(key, count)| before.get(*key).unwrap_or(&0) < count);
        let moved: Vec<&str> = moved.map(|((_, reason), _)| reason.as_str()).collect();
        let moved = moved.join(" ");
        if let Some((from, to)) = event.filter(|_| moved == reason) {
            event_seen(lab, from, to, reason)?;
        }
        Ok(because(&outcome, &moved).trim_end_matches(", ").to_owned())
    })
}

/// Packets by rule and reason, whether audited or not.
fn counters(lab: &Lab) -> Result<BTreeMap<(String, String), u64>> {
    let mut counters = BTreeMap::new();
    for counter in status(lab)?.counters {
        *counters.entry((counter.rule, counter.reason.into_owned())).or_default() += counter.packets;
    }
    Ok(counters)
}

fn daemon(lab: &Lab) -> Result<&Daemon> {
    lab.daemon.as_ref().context("no guard runs")
}

fn status(lab: &Lab) -> Result<Status> {
    daemon(lab)?.status()
}

fn in_words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Http(code) => code.to_string(),
        Outcome::NoAnswer => "no answer".to_owned(),
        Outcome::NotConnected(code, text) => format!("CONNECT {code} {text}"),
        Outcome::Error(text) => format!("error: {text}"),
    }
}
