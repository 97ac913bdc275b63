//! Owns the main job as a list of attempts: who, to what, by which way, what was expected, what became of it.
//! Called by the demo, and by the lab test that holds the same bar.
//! Must never pass a line whose outcome was right by accident: the reason has to be the right one too.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    client::{Outcome, follow_log, http, https, tcp, through, upgraded_echo},
    helper::LOG_LINES,
    lab::{KUBELET, Lab, POD_PORTS, POLICY},
    net::Who,
    process::{output, until},
};

/// One line.
pub struct Line {
    /// Who tried.
    pub who: &'static str,
    /// What.
    pub to: String,
    /// By which way.
    pub way: &'static str,
    /// What should become of it.
    pub expected: String,
    /// What did.
    pub seen: String,
    /// The kernel's or the tunnel's reason.
    pub reason: String,
    /// Whether both are the same.
    pub ok: bool,
}

/// Every attempt of the main job.
pub fn main_job(lab: &mut Lab, mut show: impl FnMut(&Line) -> Result<()>) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for v6 in [false, true] {
        through_the_tunnel(lab, v6, &mut lines, &mut show)?;
        directly(lab, v6, &mut lines, &mut show)?;
        refused_dials(lab, v6, &mut lines, &mut show)?;
    }
    local_processes(lab, &mut lines, &mut show)?;
    Ok(lines)
}

fn through_the_tunnel(
    lab: &mut Lab,
    v6: bool,
    lines: &mut Vec<Line>,
    show: &mut dyn FnMut(&Line) -> Result<()>,
) -> Result<()> {
    let kubelet = SocketAddr::new(Who::Node.address(v6), KUBELET).to_string();
    let pod = SocketAddr::new(Who::Pod.address(v6), POD_PORTS[0]).to_string();
    let ca = lab.certs.path("ca.crt");
    let mut attempt = |what: &str, to: &str, code: &dyn Fn(&Lab) -> Result<Outcome>| {
        let line = judged(lab, "control-plane", format!("{to} {what}"), "tunnel", Outcome::Http(200), "tunnel", code)?;
        show(&line)?;
        lines.push(line);
        anyhow::Ok(())
    };
    attempt("/healthz", &kubelet, &|lab| Ok(https(through(lab.server()?, &kubelet), "/healthz", &ca)))?;
    attempt("log, streamed", &kubelet, &|lab| {
        let stream = through(lab.server()?, &kubelet).map_err(|outcome| anyhow::anyhow!("{outcome:?}"))?;
        let (count, over) = follow_log(stream, &ca)?;
        ensure!(
            count == LOG_LINES && over > Duration::from_millis(100),
            "{count} lines over {over:?}: not as they were written"
        );
        Ok(Outcome::Http(200))
    })?;
    attempt("echo, upgraded", &kubelet, &|lab| {
        let stream = through(lab.server()?, &kubelet).map_err(|outcome| anyhow::anyhow!("{outcome:?}"))?;
        upgraded_echo(stream, &ca).map(|_| Outcome::Http(200))
    })?;
    attempt("/", &pod, &|lab| Ok(http(through(lab.server()?, &pod), "/")))
}

fn directly(lab: &mut Lab, v6: bool, lines: &mut Vec<Line>, show: &mut dyn FnMut(&Line) -> Result<()>) -> Result<()> {
    let kubelet = SocketAddr::new(Who::Node.address(v6), KUBELET);
    let [guarded, open] = POD_PORTS.map(|port| SocketAddr::new(Who::Pod.address(v6), port));
    let cases = [
        (Who::Stranger, kubelet, Outcome::NoAnswer, "no-selector"),
        (Who::ControlPlane, kubelet, Outcome::NoAnswer, "no-selector"),
        (Who::Peer, kubelet, Outcome::Http(200), "ip-block"),
        (Who::Excepted, kubelet, Outcome::NoAnswer, "except"),
        (Who::Pod, kubelet, Outcome::NoAnswer, "no-selector"),
        (Who::Stranger, guarded, Outcome::NoAnswer, "no-selector"),
        (Who::Stranger, open, Outcome::Http(200), ""),
    ];
    for (who, to, expected, reason) in cases {
        let ca = lab.certs.path("ca.crt");
        let line = judged(lab, who.name(), to.to_string(), "direct", expected.clone(), reason, &|lab| {
            lab.net.run(who, || {
                Ok(if to.port() == KUBELET { https(tcp(to), "/healthz", &ca) } else { http(tcp(to), "/") })
            })
        })?;
        let mut line = line;
        if expected == Outcome::NoAnswer && !event_seen(lab, who, to, v6, reason)? {
            line.ok = false;
            line.seen.push_str(" (and no event)");
        }
        show(&line)?;
        lines.push(line);
    }
    Ok(())
}

/// Whether the denial's event says who, whom and why.
fn event_seen(lab: &mut Lab, who: Who, to: SocketAddr, v6: bool, reason: &str) -> Result<bool> {
    let daemon = lab.daemon()?;
    let source = who.address(v6);
    let found = until("the event", Duration::from_secs(2), || {
        Ok(daemon.status()?.last_denies.iter().any(|event| {
            let field = |name: &str| {
                event
                    .get(name)
                    .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
                    .unwrap_or_default()
            };
            let from = field("source").parse::<SocketAddr>().map(|address| address.ip());
            from == Ok(source)
                && field("destination") == to.ip().to_string()
                && field("port") == to.port().to_string()
                && field("reason") == reason
        }))
    });
    Ok(found.is_ok())
}

fn refused_dials(
    lab: &mut Lab,
    v6: bool,
    lines: &mut Vec<Line>,
    show: &mut dyn FnMut(&Line) -> Result<()>,
) -> Result<()> {
    let pod = SocketAddr::new(Who::Pod.address(v6), POD_PORTS[1]).to_string();
    let node = SocketAddr::new(Who::Node.address(v6), 22).to_string();
    let cases: &[(&str, &str)] = if v6 {
        &[
            ("[fe80::1]:80", "link-local"),
            ("[::1]:22", "loopback"),
            (&pod, "port-not-named"),
            (&node, "port-not-named"),
            ("[fd00:8::5]:80", "address-not-named"),
        ]
    } else {
        &[
            ("169.254.169.254:80", "link-local"),
            ("127.0.0.1:22", "loopback"),
            (&pod, "port-not-named"),
            (&node, "port-not-named"),
            ("10.0.8.5:80", "address-not-named"),
            ("localhost:10250", "loopback"),
        ]
    };
    for (to, reason) in cases {
        let started = Instant::now();
        let outcome = match through(lab.server()?, to) {
            Ok(_) => Outcome::Http(200),
            Err(outcome) => outcome,
        };
        let daemon = lab.daemon()?;
        let refused = daemon.status()?.last_refused_dials;
        let said = refused.last().filter(|dial| dial.get("requested").and_then(|value| value.as_str()) == Some(to));
        let said = said.and_then(|dial| dial.get("reason")?.as_str()).unwrap_or("-").to_owned();
        let audited = daemon
            .printed()
            .lines()
            .any(|line| line.contains("dial refused") && line.contains(to) && line.contains(reason));
        let seen = match &outcome {
            Outcome::NotConnected(code, _) => {
                format!("CONNECT {code}{}", if audited { "" } else { " (and no audit line)" })
            }
            Outcome::Http(_) | Outcome::NoAnswer | Outcome::Error(_) => in_words(&outcome),
        };
        let named = matches!(&outcome, Outcome::NotConnected(502, text) if text.contains("nodeguard refuses"));
        let ok = named && said == *reason && audited && started.elapsed() < Duration::from_secs(5);
        let line = Line {
            who: "control-plane",
            to: (*to).to_owned(),
            way: "tunnel",
            expected: format!("CONNECT 502, {reason}"),
            seen,
            reason: said,
            ok,
        };
        show(&line)?;
        lines.push(line);
    }
    Ok(())
}

/// A process of the node that is not the guard: denied on loopback too, until the policy allows `node`.
fn local_processes(lab: &mut Lab, lines: &mut Vec<Line>, show: &mut dyn FnMut(&Line) -> Result<()>) -> Result<()> {
    for (allowed, expected, reason) in [(false, Outcome::NoAnswer, "no-selector"), (true, Outcome::Http(200), "node")] {
        if allowed {
            let before = lab.daemon()?.status()?.policy.epoch;
            lab.write_policy(&with_node_selector())?;
            let daemon = lab.daemon()?;
            until("the edit is in force", Duration::from_secs(5), || Ok(daemon.status()?.policy.epoch > before))?;
        }
        for to in ["127.0.0.1:10250", "[::1]:10250", "10.0.0.2:10250", "[fd00::2]:10250"] {
            let who = if allowed { "local, `node` allowed" } else { "local process" };
            let ca = lab.certs.path("ca.crt").display().to_string();
            let line = judged(lab, who, to.to_owned(), "direct", expected.clone(), reason, &|lab| {
                let said = output(lab.helper(Who::Node, &["get", to, &ca])?)?;
                serde_json::from_slice(&said.stdout).with_context(|| String::from_utf8_lossy(&said.stderr).into_owned())
            })?;
            show(&line)?;
            lines.push(line);
        }
    }
    Ok(())
}

/// The lab's policy with `node: {}` for kubelet.
pub fn with_node_selector() -> String {
    POLICY.replacen("        - tunnel: {}\n", "        - tunnel: {}\n        - node: {}\n", 1)
}

/// Makes an attempt and holds it against what was expected: the outcome, and the one counter that moved.
fn judged(
    lab: &mut Lab,
    who: &'static str,
    to: String,
    way: &'static str,
    expected: Outcome,
    reason: &str,
    code: &dyn Fn(&Lab) -> Result<Outcome>,
) -> Result<Line> {
    let before = counters(lab)?;
    let outcome = code(lab).unwrap_or_else(|error| Outcome::Error(format!("{error:#}")));
    let after = counters(lab)?;
    let moved: Vec<&str> = after
        .iter()
        .filter(|(key, count)| before.get(*key).unwrap_or(&0) < count)
        .map(|(key, _)| key.1.as_str())
        .collect();
    let moved = moved.join(" ");
    let expects = if reason.is_empty() { in_words(&expected) } else { format!("{}, {reason}", in_words(&expected)) };
    Ok(Line {
        who,
        to,
        way,
        expected: expects,
        seen: in_words(&outcome),
        ok: outcome == expected && moved == reason,
        reason: moved,
    })
}

/// Packets by rule and reason, whether audited or not.
fn counters(lab: &mut Lab) -> Result<BTreeMap<(String, String), u64>> {
    let mut counters = BTreeMap::new();
    for counter in lab.daemon()?.status()?.counters {
        *counters.entry((counter.rule, counter.reason)).or_default() += counter.packets;
    }
    Ok(counters)
}

fn in_words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Http(code) => code.to_string(),
        Outcome::NoAnswer => "no answer".to_owned(),
        Outcome::NotConnected(code, text) => format!("CONNECT {code} {text}"),
        Outcome::Error(text) => format!("error: {text}"),
    }
}
