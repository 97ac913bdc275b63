//! Owns sending a shape and comparing what becomes of it with what should: the answer, and the counters.
//! Called by the lab and by `nodeguard-guest`.
//! Must never pass by chance: a denial is counted once for each packet that the guard judges, and nothing comes back.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use guard_common::{Reason, Verdict};

use super::{
    Flow, Heard, heard,
    shapes::{Answer, Shape, flow_of},
    wire::Wire,
};

/// Who sends a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// Whom no rule admits.
    Stranger,
    /// Whom the port's rules admit by address.
    Peer,
    /// The same stranger on a flow that has a pinhole.
    Pinhole,
}

/// Packets by reason.
pub type Counts = BTreeMap<&'static str, u64>;

/// How long nothing more is waited for once all is as expected, and at most.
const QUIET: Duration = Duration::from_millis(12);
const PATIENCE: Duration = Duration::from_secs(2);

/// Sends a shape and compares what becomes of it with what should.
pub fn check(
    shape: &Shape,
    sender: Sender,
    flow: Flow,
    wire: &Wire,
    counts: &dyn Fn() -> Result<Counts>,
) -> Result<()> {
    let (admitted, reason) = match sender {
        Sender::Peer => (true, Reason::IpBlock),
        Sender::Pinhole if shape.has_port => (true, Reason::Tunnel),
        Sender::Stranger | Sender::Pinhole => (false, Reason::NoSelector),
    };
    // Nobody asks the guard about what is for no socket.
    let answer = if admitted || shape.judged == 0 { shape.answer } else { Answer::Nothing };
    let (before, answers) = (counts()?, flow_of(shape, flow));
    (shape.packets)(flow).iter().try_for_each(|packet| wire.send(packet))?;
    let (started, mut seen, mut settled) = (Instant::now(), Vec::new(), None::<Instant>);
    // What is judged by nobody may still be on its way.
    let quiet = if shape.judged == 0 { QUIET * 2 } else { QUIET };
    let moved = loop {
        while let Some(packet) = wire.receive(Duration::from_millis(1))? {
            seen.extend(heard(answers, &packet).map(|heard| answer_of(&heard)));
        }
        let moved = moved(&before, &counts()?);
        let is_judged = moved.get(reason.name()).copied().unwrap_or(0) >= shape.judged;
        let is_answered = answer == Answer::Nothing || seen.contains(&answer);
        let is_settled = is_judged && is_answered && settled.get_or_insert_with(Instant::now).elapsed() > quiet;
        if is_settled || started.elapsed() > PATIENCE {
            break moved;
        }
    };
    let expected: Vec<Answer> = (answer != Answer::Nothing).then_some(answer).into_iter().collect();
    // A SYN-ACK that nobody answers is sent again.
    seen.dedup();
    let what = format!("{} from {sender:?}", shape.name);
    ensure!(seen == expected, "{what}: answered {seen:?}, expected {expected:?}; counted {moved:?}");
    let wanted: Counts = (shape.judged > 0).then_some((reason.name(), shape.judged)).into_iter().collect();
    ensure!(denials(&moved) == denials(&wanted), "{what}: counted {moved:?}, expected {wanted:?}");
    let counted = moved.get(reason.name()).copied().unwrap_or(0);
    // An admitted one may be followed by what the sender's own stack makes of the answer.
    let is_counted = counted >= shape.judged && (counted == 0 || shape.judged > 0);
    ensure!(is_counted, "{what}: counted {moved:?}, expected {wanted:?}");
    Ok(())
}

fn denials(counts: &Counts) -> Counts {
    let is_denial =
        |name: &str| Reason::ALL.into_iter().any(|reason| reason.name() == name && reason.verdict() == Verdict::Deny);
    counts.iter().filter(|(name, _)| is_denial(name)).map(|(name, count)| (*name, *count)).collect()
}

fn answer_of(heard: &Heard) -> Answer {
    match heard {
        Heard::Tcp(header, _) if header.rst => Answer::Rst,
        Heard::Tcp(header, _) if header.syn && header.ack => Answer::SynAck,
        Heard::Tcp(..) => Answer::Nothing,
        Heard::Udp(_) => Answer::Datagram,
        Heard::Pong => Answer::Pong,
    }
}

/// By how much each counter moved.
pub fn moved(before: &Counts, after: &Counts) -> Counts {
    let more = |(name, count): (&&'static str, &u64)| {
        let more = count - before.get(name).unwrap_or(&0);
        (more > 0).then_some((*name, more))
    };
    after.iter().filter_map(more).collect()
}

/// What a guard has counted so far, by reason.
pub fn counts(apply: &nodeguard::kernel::tables::apply::Apply) -> Result<Counts> {
    let mut counts = Counts::new();
    for (_, reason, _, packets) in apply.counters()? {
        *counts.entry(reason.name()).or_default() += packets;
    }
    Ok(counts)
}
