//! Owns the register of dials: the ruleset that judges them, the open ones, and counts of all others.
//! Called by `serve` (every phase), by `daemon` (a new ruleset, the drain) and by `report`.
//! Must never have a dial open that the ruleset in force refuses.

use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use guard_policy::{
    authorize::{Permit, authorize},
    node_facts::NodeFacts,
    refusal::Refusal,
    ruleset::{DialDemands, Ruleset},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::sys::lock::lock;

/// How many refused dials `status` shows at most.
const REMEMBERED: usize = 32;

/// Why an open dial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The backend sent its last byte.
    BackendClosed,
    /// The backend reset the connection.
    BackendReset,
    /// The control plane closed, and all its bytes were written.
    ControlPlaneClosed,
    /// Bytes waited for the backend, and it read none for too long.
    Stalled,
    /// The policy requires TLS, and one of the two sides began with something else or not at all.
    NotTls,
    /// The backend reads, but more bytes came for it than the budgets hold, and others would have had to wait.
    OverBudget,
    /// The ruleset in force refuses the destination.
    PolicyChanged,
    /// The stream that carried the dial ended.
    TunnelLost,
    /// The guard ended, and the deadline of the drain had passed.
    Drained,
}

impl CloseReason {
    /// The stable name in records.
    pub fn name(self) -> &'static str {
        match self {
            CloseReason::BackendClosed => "backend-closed",
            CloseReason::BackendReset => "backend-reset",
            CloseReason::ControlPlaneClosed => "control-plane-closed",
            CloseReason::Stalled => "stalled",
            CloseReason::NotTls => "not-tls",
            CloseReason::OverBudget => "over-budget",
            CloseReason::PolicyChanged => "policy-changed",
            CloseReason::TunnelLost => "tunnel-lost",
            CloseReason::Drained => "drained",
        }
    }
}

/// Ends a relay from outside. The first reason counts.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    token: CancellationToken,
    reason: Arc<OnceLock<CloseReason>>,
}

impl Ending {
    /// Ends the relay.
    pub fn end(&self, reason: CloseReason) {
        let _ = self.reason.set(reason);
        self.token.cancel();
    }

    /// Why the relay was ended, if it was.
    pub fn reason(&self) -> Option<CloseReason> {
        self.reason.get().copied()
    }

    /// Waits until the relay is ended.
    pub async fn ended(&self) -> CloseReason {
        self.token.cancelled().await;
        self.reason.get().copied().unwrap_or(CloseReason::TunnelLost)
    }
}

/// A dial that was refused.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefusedDial {
    /// When it was asked for, RFC 3339.
    pub time: String,
    /// The destination that was asked for.
    pub requested: String,
    /// The address that was judged, if the destination led to one.
    pub address: Option<SocketAddr>,
    /// The stable name of the refusal.
    pub reason: Cow<'static, str>,
    /// The refusal in words.
    pub message: String,
}

/// How many dials had which outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DialCounts {
    /// Dials that were opened.
    pub admitted: u64,
    /// Refused, by the policy or because the request was malformed.
    pub refused: u64,
    /// Admitted, but the backend could not be reached.
    pub failed: u64,
    /// The part of `failed` in which nothing answered in time.
    pub timed_out: u64,
    /// Open now.
    pub open: u64,
}

/// An open dial, as the register has it.
struct Registered {
    permit: Permit,
    ending: Ending,
}

/// The dials of this process.
pub struct Connections {
    node: NodeFacts,
    ruleset: ArcSwapOption<Ruleset>,
    open: Mutex<HashMap<i64, Registered>>,
    closed: Notify,
    next: AtomicI64,
    admitted: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    timed_out: AtomicU64,
    last_refused: Mutex<VecDeque<RefusedDial>>,
}

/// An open dial. Dropping it removes it from the register.
pub struct Open {
    connections: Arc<Connections>,
    /// The connection id: positive, unique in this process, never used again.
    pub id: i64,
    /// Ends the dial from outside.
    pub ending: Ending,
    /// What admits it.
    pub permit: Permit,
}

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.connections.open).remove(&self.id);
        self.connections.closed.notify_waiters();
    }
}

impl Connections {
    /// No dials and no ruleset: every dial is refused until a ruleset is published.
    pub fn new(node: NodeFacts) -> Arc<Connections> {
        // The server keys connections by agent and id: two processes of one agent must not use the same ids.
        let first = (rand::random::<u64>() >> 2) as i64;
        Arc::new(Connections {
            node,
            ruleset: ArcSwapOption::empty(),
            open: Mutex::default(),
            closed: Notify::new(),
            next: AtomicI64::new(first.max(1)),
            admitted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            timed_out: AtomicU64::new(0),
            last_refused: Mutex::default(),
        })
    }

    /// The node's own names and addresses.
    pub fn node(&self) -> &NodeFacts {
        &self.node
    }

    /// Puts a ruleset in force and ends every open dial that it refuses. Returns how many it ended.
    pub fn publish(&self, ruleset: Option<Arc<Ruleset>>) -> usize {
        // Stored before the lock: a dial that opens at the same time is judged by the new ruleset or found below.
        self.ruleset.store(ruleset);
        let current = self.ruleset.load_full();
        let open = lock(&self.open);
        let goes_on = |entry: &&Registered| {
            let now = authorize(current.as_deref(), &self.node, entry.permit.address());
            // What a policy demands of a connection is checked when the connection begins.
            now.is_ok_and(|now| !now.demands().exceed(entry.permit.demands()))
        };
        let refused = open.values().filter(|entry| !goes_on(entry));
        refused.map(|entry| entry.ending.end(CloseReason::PolicyChanged)).count()
    }

    /// The ruleset in force.
    pub fn ruleset(&self) -> Option<Arc<Ruleset>> {
        self.ruleset.load_full()
    }

    /// Judges an address by the ruleset in force.
    pub fn authorize(&self, address: SocketAddr) -> Result<Permit, Refusal> {
        authorize(self.ruleset.load().as_deref(), &self.node, address)
    }

    /// Enters a connected dial and judges it once more: the ruleset may have changed since the permit was made.
    pub fn open(self: &Arc<Connections>, permit: Permit) -> Result<Open, Refusal> {
        let mut open = lock(&self.open);
        let checked = permit;
        let permit = self.authorize(checked.address())?;
        // A demand that is newer than the permit was not checked. TLS is an exception: it is checked from now on.
        let certificates = |permit: &Permit| DialDemands { tls: false, ..permit.demands().clone() };
        if certificates(&permit).exceed(&certificates(&checked)) {
            return Err(Refusal::KubeletCertificate);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let ending = Ending::default();
        open.insert(id, Registered { permit: permit.clone(), ending: ending.clone() });
        self.admitted.fetch_add(1, Ordering::Relaxed);
        Ok(Open { connections: Arc::clone(self), id, ending, permit })
    }

    /// Counts and remembers a refused dial.
    pub fn refuse(&self, dial: RefusedDial) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let mut last = lock(&self.last_refused);
        if last.len() == REMEMBERED {
            last.pop_front();
        }
        last.push_back(dial);
    }

    /// Counts a dial whose backend could not be reached.
    pub fn fail(&self, timed_out: bool) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.timed_out.fetch_add(u64::from(timed_out), Ordering::Relaxed);
    }

    /// Ends every open dial.
    pub fn end_all(&self, reason: CloseReason) {
        lock(&self.open).values().for_each(|entry| entry.ending.end(reason));
    }

    /// Waits until no dial is open.
    pub async fn idle(&self) {
        loop {
            let closed = self.closed.notified();
            if lock(&self.open).is_empty() {
                return;
            }
            closed.await;
        }
    }

    /// How many dials had which outcome.
    pub fn counts(&self) -> DialCounts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let open = lock(&self.open).len() as u64;
        DialCounts {
            admitted: count(&self.admitted),
            refused: count(&self.refused),
            failed: count(&self.failed),
            timed_out: count(&self.timed_out),
            open,
        }
    }

    /// The last refused dials, the newest last.
    pub fn last_refused(&self) -> Vec<RefusedDial> {
        lock(&self.last_refused).iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use guard_policy::{compile::compile, diagnostic::Source};

    use super::*;

    fn ruleset(dial: &str) -> Option<Arc<Ruleset>> {
        let text = format!(
            "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: t}}\nspec: {{mode: Enforce, guard: [], tunnel: {{dial: {dial}}}}}\n"
        );
        Some(Arc::new(compile(&Source { path: "t".into(), text }, &NodeFacts::default()).unwrap().0))
    }

    #[tokio::test]
    async fn a_tightened_ruleset_ends_what_it_refuses_and_nothing_else() {
        let connections = Connections::new(NodeFacts::default());
        let (kept, cut) = ("10.0.0.1:80".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        assert_eq!(connections.authorize(kept), Err(Refusal::NoPolicy));
        connections.publish(ruleset("[pods: {cidrs: [10.0.0.0/30], ports: [80]}]"));
        let kept = connections.open(connections.authorize(kept).unwrap()).unwrap();
        let permit = connections.authorize(cut).unwrap();
        let cut = connections.open(permit.clone()).unwrap();
        assert_eq!(connections.publish(ruleset("[pods: {cidrs: [10.0.0.1/32], ports: [80]}]")), 1);
        assert_eq!(cut.ending.ended().await, CloseReason::PolicyChanged);
        assert!(!kept.ending.token.is_cancelled());
        // A permit of the old ruleset opens nothing under the new one.
        assert_eq!(connections.open(permit).err(), Some(Refusal::AddressNotNamed));
        // What a policy asks of a connection from now on, an open one may lack.
        connections.publish(ruleset("[{pods: {cidrs: [10.0.0.1/32], ports: [80]}, tls: Required}]"));
        assert_eq!(kept.ending.ended().await, CloseReason::PolicyChanged);
        drop((kept, cut));
        connections.idle().await;
        assert_eq!((connections.counts().admitted, connections.counts().open), (2, 0));
    }
}
