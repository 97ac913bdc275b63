//! Owns the main job as a list of attempts: who, to what, by which way, what was expected, what became of it.
//! Called by the demo, and by the lab tests that hold the same bar.
//! Must never pass a line whose outcome was right by accident: the reason has to be the right one too.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};

use super::{
    KUBELET, Lab, POD_PORTS, POLICY,
    client::{Outcome, Stream, follow_log, http, https, tcp, through, upgraded_echo},
    helper::LOG_LINES,
    net::Who,
};
use crate::process::until;

/// One attempt.
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

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line { who, to, expected, seen, reason, .. } = self;
        write!(f, "{who} -> {to}: wanted {expected}, saw {seen} {reason}")
    }
}

/// Makes every attempt of the main job and shows each.
pub fn main_job(lab: &mut Lab, mut show: impl FnMut(&Line) -> Result<()>) -> Result<Vec<Line>> {
    let mut job = Job { lab, lines: Vec::new(), show: &mut show };
    for v6 in [false, true] {
        job.through_the_tunnel(v6)?;
        job.directly(v6)?;
        job.refused_dials(v6)?;
    }
    job.local_processes()?;
    Ok(job.lines)
}

/// The lab's policy with `node: {}` for kubelet.
pub fn with_node_selector() -> String {
    POLICY.replacen("        - tunnel: {}\n", "        - tunnel: {}\n        - node: {}\n", 1)
}

struct Job<'a> {
    lab: &'a mut Lab,
    lines: Vec<Line>,
    show: &'a mut dyn FnMut(&Line) -> Result<()>,
}

/// What an attempt does.
type Attempt<'a> = &'a dyn Fn(&Lab) -> Result<Outcome>;

impl Job<'_> {
    fn through_the_tunnel(&mut self, v6: bool) -> Result<()> {
        let kubelet = Who::Node.at(v6, KUBELET).to_string();
        let pod = Who::Pod.at(v6, POD_PORTS[0]).to_string();
        let ca = self.lab.certs.path("ca.crt");
        let stream = |lab: &Lab| -> Result<Box<dyn Stream>> {
            through(lab.server()?, &kubelet).map_err(|outcome| anyhow!("{outcome:?}"))
        };
        let attempts: [(&str, &str, Attempt<'_>); 4] = [
            (&kubelet, "/healthz", &|lab| lab.healthz_dialled(&kubelet)),
            (&kubelet, "log, streamed", &|lab| {
                let (count, over) = follow_log(stream(lab)?, &ca)?;
                let as_written = count == LOG_LINES && over > Duration::from_millis(100);
                ensure!(as_written, "{count} lines over {over:?}: not as they were written");
                Ok(Outcome::Http(200))
            }),
            (&kubelet, "echo, upgraded", &|lab| upgraded_echo(stream(lab)?, &ca).map(|_| Outcome::Http(200))),
            (&pod, "/", &|lab| Ok(http(through(lab.server()?, &pod), "/"))),
        ];
        for (to, what, code) in attempts {
            let line =
                self.judged("control-plane", format!("{to} {what}"), "tunnel", Outcome::Http(200), "tunnel", code)?;
            self.add(line)?;
        }
        Ok(())
    }

    fn directly(&mut self, v6: bool) -> Result<()> {
        let kubelet = Who::Node.at(v6, KUBELET);
        let [guarded, open] = POD_PORTS.map(|port| Who::Pod.at(v6, port));
        let ca = self.lab.certs.path("ca.crt");
        for (who, to, expected, reason) in [
            (Who::Stranger, kubelet, Outcome::NoAnswer, "no-selector"),
            (Who::ControlPlane, kubelet, Outcome::NoAnswer, "no-selector"),
            (Who::Peer, kubelet, Outcome::Http(200), "ip-block"),
            (Who::Excepted, kubelet, Outcome::NoAnswer, "except"),
            (Who::Pod, kubelet, Outcome::NoAnswer, "no-selector"),
            (Who::Stranger, guarded, Outcome::NoAnswer, "no-selector"),
            (Who::Stranger, open, Outcome::Http(200), ""),
        ] {
            let get = || Ok(if to == kubelet { https(tcp(to), "/healthz", &ca) } else { http(tcp(to), "/") });
            let is_denied = expected == Outcome::NoAnswer;
            let mut line =
                self.judged(who.name(), to.to_string(), "direct", expected, reason, &|lab| lab.net.run(who, get))?;
            if is_denied && !self.event_seen(who.at(v6, 0), to, reason)? {
                line.ok = false;
                line.seen.push_str(" (and no event)");
            }
            self.add(line)?;
        }
        Ok(())
    }

    /// Whether the denial's event says who, whom and why.
    fn event_seen(&mut self, from: SocketAddr, to: SocketAddr, reason: &str) -> Result<bool> {
        let daemon = self.lab.daemon()?;
        let found = until("the event", Duration::from_secs(2), || {
            Ok(daemon.status()?.last_denies.iter().any(|event| {
                event.source.ip() == from.ip()
                    && event.destination == to.ip()
                    && event.port == to.port()
                    && event.reason == reason
            }))
        });
        Ok(found.is_ok())
    }

    fn refused_dials(&mut self, v6: bool) -> Result<()> {
        let pod = Who::Pod.at(v6, POD_PORTS[1]).to_string();
        let node = Who::Node.at(v6, 22).to_string();
        let [metadata, loopback, peer] = if v6 {
            ["[fe80::1]:80", "[::1]:22", "[fd00:8::5]:80"]
        } else {
            ["169.254.169.254:80", "127.0.0.1:22", "10.0.8.5:80"]
        };
        for (to, reason) in [
            (metadata, "link-local"),
            (loopback, "loopback"),
            (&pod, "port-not-named"),
            (&node, "port-not-named"),
            (peer, "address-not-named"),
        ] {
            self.refused_dial(to, reason)?;
        }
        if v6 { Ok(()) } else { self.refused_dial("localhost:10250", "loopback") }
    }

    fn refused_dial(&mut self, to: &str, reason: &str) -> Result<()> {
        let started = Instant::now();
        let outcome = through(self.lab.server()?, to).map_or_else(|outcome| outcome, |_| Outcome::Http(200));
        let took = started.elapsed();
        let daemon = self.lab.daemon()?;
        let refused = daemon.status()?.last_refused_dials;
        let last = refused.last().filter(|dial| dial.requested == to);
        let said = last.map_or("-", |dial| &dial.reason);
        let printed = daemon.printed();
        let is_record = |line: &str| line.contains("dial refused") && line.contains(to) && line.contains(reason);
        let audited = printed.lines().any(is_record);
        let seen = match &outcome {
            Outcome::NotConnected(code, _) if audited => format!("CONNECT {code}"),
            Outcome::NotConnected(code, _) => format!("CONNECT {code} (and no audit line)"),
            Outcome::Http(_) | Outcome::NoAnswer | Outcome::Error(_) => in_words(&outcome),
        };
        let named = matches!(&outcome, Outcome::NotConnected(502, text) if text.contains("nodeguard refuses"));
        self.add(Line {
            who: "control-plane",
            to: to.to_owned(),
            way: "tunnel",
            expected: format!("CONNECT 502, {reason}"),
            seen,
            ok: named && said == reason && audited && took < Duration::from_secs(5),
            reason: said.to_owned(),
        })
    }

    /// A process of the node that is not the guard: denied on loopback too, until the policy allows `node`.
    fn local_processes(&mut self) -> Result<()> {
        let addresses = ["127.0.0.1:10250", "[::1]:10250", "10.0.0.2:10250", "[fd00::2]:10250"];
        let ca = self.lab.certs.path("ca.crt").display().to_string();
        let get = |lab: &Lab, to: &str| lab.ask(Who::Node, "", &["get", to, &ca]);
        for to in addresses {
            let (expected, reason) = (Outcome::NoAnswer, "no-selector");
            let line = self.judged("local process", to.to_owned(), "direct", expected, reason, &|lab| get(lab, to))?;
            self.add(line)?;
        }
        let epoch = self.lab.daemon()?.status()?.policy.epoch;
        self.lab.write_policy(&with_node_selector())?;
        self.lab.daemon()?.in_force_after(epoch)?;
        for to in addresses {
            let (who, expected) = ("local, `node` allowed", Outcome::Http(200));
            let line = self.judged(who, to.to_owned(), "direct", expected, "node", &|lab| get(lab, to))?;
            self.add(line)?;
        }
        Ok(())
    }

    fn add(&mut self, line: Line) -> Result<()> {
        (self.show)(&line)?;
        self.lines.push(line);
        Ok(())
    }

    /// Makes an attempt and compares it with what was expected: the outcome, and the one counter that moved.
    fn judged(
        &mut self,
        who: &'static str,
        to: String,
        way: &'static str,
        expected: Outcome,
        reason: &str,
        code: Attempt<'_>,
    ) -> Result<Line> {
        let before = self.counters()?;
        let outcome = code(self.lab).unwrap_or_else(|error| Outcome::Error(format!("{error:#}")));
        let after = self.counters()?;
        let moved = after.iter().filter(|(key, count)| before.get(*key).unwrap_or(&0) < count);
        let moved: Vec<&str> = moved.map(|((_, reason), _)| reason.as_str()).collect();
        let moved = moved.join(" ");
        let (seen, ok) = (in_words(&outcome), outcome == expected && moved == reason);
        let because = if reason.is_empty() { String::new() } else { format!(", {reason}") };
        Ok(Line { who, to, way, expected: in_words(&expected) + &because, seen, reason: moved, ok })
    }

    /// Packets by rule and reason, whether audited or not.
    fn counters(&mut self) -> Result<BTreeMap<(String, String), u64>> {
        let mut counters = BTreeMap::new();
        for counter in self.lab.daemon()?.status()?.counters {
            *counters.entry((counter.rule, counter.reason.into_owned())).or_default() += counter.packets;
        }
        Ok(counters)
    }
}

fn in_words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Http(code) => code.to_string(),
        Outcome::NoAnswer => "no answer".to_owned(),
        Outcome::NotConnected(code, text) => format!("CONNECT {code} {text}"),
        Outcome::Error(text) => format!("error: {text}"),
    }
}
