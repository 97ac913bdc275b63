//! Owns what the programs say of denials: drains the ring buffer, keeps the last ones, logs them within a rate.
//! Called by `run` (one task); `report` reads the last denials.
//! Must never count: the kernel's counters are exact, events may be lost under a flood.

use std::{
    borrow::Cow,
    collections::VecDeque,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use aya::maps::{MapData, RingBuf};
use guard_common::{Reason, abi::DenyEvent};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes;

use crate::{kernel::tables::apply::AppliedRuleset, sys::lock::lock};

/// How many denials `status` can show.
const KEPT: usize = 64;
/// Log lines a second; the rest is summed up in one.
const LOGGED_PER_SECOND: u32 = 20;
/// Records taken before other tasks get their turn.
const BATCH: usize = 4096;

/// One denial.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Denial {
    /// When, RFC 3339.
    pub time: String,
    /// Who connected; port 0 where the TCP header could not be read.
    pub source: SocketAddr,
    /// What it connected to.
    pub destination: IpAddr,
    /// The guarded port.
    pub port: u16,
    /// The rule's name; empty where no rule was reached.
    pub rule: String,
    /// The stable name of the reason.
    pub reason: Cow<'static, str>,
    /// Whether the packet was allowed because the rule only audits.
    pub audited: bool,
    /// The epoch of the ruleset that decided.
    pub epoch: u32,
    /// How many denials with the same source, port, rule and reason were not reported since the last one that was.
    pub repeats: u32,
}

/// The last denials, the newest last.
#[derive(Debug, Default)]
pub struct DenialLog {
    last: Mutex<VecDeque<Denial>>,
}

impl DenialLog {
    /// A copy, the newest last.
    pub fn last(&self) -> Vec<Denial> {
        lock(&self.last).iter().cloned().collect()
    }

    fn push(&self, denial: Denial) {
        let mut last = lock(&self.last);
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(denial);
    }
}

/// Drains the ring buffer until the task is dropped.
pub async fn drain(
    events: RingBuf<MapData>,
    in_force: Arc<ArcSwap<AppliedRuleset>>,
    log: Arc<DenialLog>,
) -> io::Result<()> {
    // SAFETY: the ring buffer owns its descriptor, and nothing replaces or closes it while it is registered.
    let mut events = unsafe { AsyncFd::register(events) }?;
    let mut rate = Rate { since: Instant::now(), logged: 0, suppressed: 0 };
    loop {
        let mut ready = events.readable_mut().await?;
        let mut taken = 0;
        while taken < BATCH
            && let Some(record) = ready.get_inner_mut().next()
        {
            taken += 1;
            if let Ok(event) = DenyEvent::read_from_bytes(&record) {
                let denial = in_words(&event, &in_force.load());
                rate.log(&denial);
                log.push(denial);
            }
        }
        if taken < BATCH {
            ready.clear_ready();
        } else {
            tokio::task::yield_now().await;
        }
    }
}

struct Rate {
    since: Instant,
    logged: u32,
    suppressed: u64,
}

impl Rate {
    fn log(&mut self, denial: &Denial) {
        if self.since.elapsed() >= Duration::from_secs(1) {
            if self.suppressed > 0 {
                tracing::warn!(denials = self.suppressed, "more denials in the last second than are logged");
            }
            *self = Rate { since: Instant::now(), logged: 0, suppressed: 0 };
        }
        if self.logged >= LOGGED_PER_SECOND {
            self.suppressed += 1;
            return;
        }
        self.logged += 1;
        let Denial { source, destination, port, rule, reason, audited, epoch, repeats, .. } = denial;
        let outcome = if *audited { "would be denied (audit)" } else { "denied" };
        tracing::info!(%source, %destination, port, rule, %reason, epoch, repeats, "connection {outcome}");
    }
}

fn in_words(event: &DenyEvent, in_force: &AppliedRuleset) -> Denial {
    let address = |bytes: [u8; 16]| Ipv6Addr::from(bytes).to_canonical();
    Denial {
        time: wall_clock(event.at_ns),
        source: SocketAddr::new(address(event.source), u16::from_be_bytes(event.source_port)),
        destination: address(event.destination),
        port: event.port,
        rule: in_force.names.get(&event.rule).cloned().unwrap_or_default(),
        reason: Reason::from_index(event.reason).map_or("unknown", Reason::name).into(),
        audited: event.audited != 0,
        epoch: event.epoch,
        repeats: event.repeats,
    }
}

/// A time of the kernel's monotonic clock as wall-clock time.
fn wall_clock(at_ns: u64) -> String {
    let now_ns = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|now| Duration::from(now).as_nanos() as u64)
        .unwrap_or(at_ns);
    let at = SystemTime::now() - Duration::from_nanos(now_ns.saturating_sub(at_ns));
    jiff::Timestamp::try_from(at).map(|at| format!("{at:.3}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_told_in_words() {
        let event = DenyEvent {
            source: guard_common::packet::mapped([10, 0, 8, 66]),
            destination: Ipv6Addr::LOCALHOST.octets(),
            source_port: 40_000u16.to_be_bytes(),
            port: 10_250,
            rule: 3,
            reason: Reason::Except as u8,
            epoch: 7,
            ..DenyEvent::default()
        };
        let in_force = AppliedRuleset { epoch: 7, names: [(3, "kubelet".to_owned())].into() };
        let denial = in_words(&event, &in_force);
        assert_eq!(denial.source.to_string(), "10.0.8.66:40000");
        assert_eq!(denial.destination.to_string(), "::1");
        assert_eq!((denial.rule.as_str(), &*denial.reason, denial.audited), ("kubelet", "except", false));
    }

    #[test]
    fn only_the_last_denials_are_kept() {
        let log = DenialLog::default();
        for port in 0..200 {
            log.push(in_words(&DenyEvent { port, ..DenyEvent::default() }, &AppliedRuleset::default()));
        }
        let last = log.last();
        assert_eq!((last.len(), last[0].port, last[KEPT - 1].port), (KEPT, 136, 199));
    }
}
