//! Owns the check of kubelet's serving certificate: a TLS handshake of our own before a dial to kubelet.
//! Called by `serve`, for addresses whose entry in the policy has a `certificate`.
//! Must never let a dial pass on a check that is older than the listener that it reaches, or than `HELD`.
//!
//! In TLS 1.3 only the two ends see the certificate of a connection, so the promise is this: the last handshake with the same listening
//! sockets, at most `HELD` ago, showed a certificate that the policy asks for. A restarted kubelet, another process on its port or a changed
//! CA file makes the next dial wait for a new handshake.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use guard_policy::ruleset::{CertificateDemand, Ruleset};
use rustls::pki_types::ServerName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    dial::{
        backend::BackendError,
        kubelet::{
            certificate,
            certificate::{CertificateRefusal, Shown, explain},
        },
    },
    kernel::cut::sock_diag,
    sys::lock::lock,
};

/// How long a check that held is valid while the listener is the same.
const HELD: Duration = Duration::from_secs(30);
/// How long a check that did not hold is valid: a flood of dials causes no flood of handshakes.
const REFUSED: Duration = Duration::from_secs(1);
/// How many addresses are remembered.
const REMEMBERED: usize = 256;

/// Why a dial does not pass.
#[derive(Debug)]
pub enum CheckError {
    /// No TCP connection: the dial would have none either.
    Unreachable(BackendError),
    /// The TLS handshake or the certificate is not what the policy asks for.
    Refused(Arc<CertificateRefusal>),
}

/// The last check of a serving certificate.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CertificateState {
    /// The address of kubelet.
    pub address: SocketAddr,
    /// When it was checked, RFC 3339.
    pub checked: String,
    /// SHA-256 of the certificate (DER).
    pub sha256: Option<String>,
    /// Why it is refused, if it is.
    pub error: Option<String>,
}

/// Checks of serving certificates, by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CertificateChecks {
    /// The certificate was the one that the policy asks for.
    pub held: u64,
    /// It was another one, or there was no TLS.
    pub refused: u64,
    /// There was no connection.
    pub unreachable: u64,
}

/// What the listener is, as far as it can be told without asking it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    listeners: BTreeSet<u64>,
    /// Device, inode, size, and time of change of the CA file.
    ca: Option<(u64, u64, u64, i64, i64)>,
}

#[derive(Clone)]
struct Checked {
    at: Instant,
    stamp: Option<Stamp>,
    /// RFC 3339: when.
    time: String,
    sha256: Option<[u8; 32]>,
    refusal: Option<Arc<CertificateRefusal>>,
}

type Key = (SocketAddr, Arc<CertificateDemand>);
/// Locked during a check: other dials wait for its result.
type Slot = Arc<tokio::sync::Mutex<()>>;

/// The certificates that were checked.
#[derive(Default)]
pub struct Certificates {
    slots: Mutex<HashMap<Key, Slot>>,
    checked: Mutex<HashMap<Key, Checked>>,
    held: AtomicU64,
    refused: AtomicU64,
    unreachable: AtomicU64,
}

impl Certificates {
    /// Passes if the certificate at an address is what the policy asks for. `connect` only runs if a new handshake is needed.
    pub async fn check(
        &self,
        address: SocketAddr,
        demand: &Arc<CertificateDemand>,
        connect: impl Future<Output = Result<TcpStream, BackendError>>,
    ) -> Result<(), CheckError> {
        let key = (address, Arc::clone(demand));
        let slot = {
            let mut slots = lock(&self.slots);
            if slots.len() >= REMEMBERED && !slots.contains_key(&key) {
                slots.clear();
            }
            Arc::clone(slots.entry(key.clone()).or_default())
        };
        let _one_at_a_time = slot.lock().await;
        let stamp = stamp(address, demand);
        let before = lock(&self.checked).get(&key).cloned();
        if let Some(before) = &before
            && is_fresh(before, stamp.as_ref())
        {
            return before.result();
        }
        let stream = connect.await.map_err(|error| {
            self.unreachable.fetch_add(1, Ordering::Relaxed);
            CheckError::Unreachable(error)
        })?;
        let shown = handshake(stream, address, demand).await;
        let count = if shown.refusal.is_none() { &self.held } else { &self.refused };
        count.fetch_add(1, Ordering::Relaxed);
        report(address, before.as_ref(), &shown);
        let now = Checked {
            at: Instant::now(),
            stamp,
            time: format!("{:.3}", jiff::Timestamp::now()),
            sha256: shown.sha256,
            refusal: shown.refusal.map(Arc::new),
        };
        let result = now.result();
        let mut checked = lock(&self.checked);
        if checked.len() >= REMEMBERED && !checked.contains_key(&key) {
            checked.clear();
        }
        checked.insert(key, now);
        result
    }

    /// Whether the same sockets listen as at the last check. It is asked when a connection is made: then the connection is theirs.
    pub(crate) fn still_listens(&self, address: SocketAddr, demand: &Arc<CertificateDemand>) -> bool {
        let now = stamp(address, demand);
        let checked = lock(&self.checked);
        // Where the kernel does not say who listens, there is nothing to compare.
        checked.get(&(address, Arc::clone(demand))).is_some_and(|checked| checked.stamp == now)
    }

    /// The last check of each certificate that a ruleset asks for, by address.
    pub fn states(&self, ruleset: Option<&Ruleset>) -> Vec<CertificateState> {
        let demanded = |demand: &Arc<CertificateDemand>| {
            ruleset.is_some_and(|ruleset| ruleset.dial.iter().any(|rule| rule.demands.certificates.contains(demand)))
        };
        let checked = lock(&self.checked);
        let mut states: Vec<CertificateState> = checked
            .iter()
            .filter(|((_, demand), _)| demanded(demand))
            .map(|((address, _), seen)| seen.state(*address))
            .collect();
        states.sort_by_key(|state| state.address);
        states
    }

    /// The checks so far, by result.
    pub fn counts(&self) -> CertificateChecks {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CertificateChecks {
            held: count(&self.held),
            refused: count(&self.refused),
            unreachable: count(&self.unreachable),
        }
    }
}

impl CertificateState {
    /// What to report if the certificate is refused.
    pub fn weakened(&self) -> Option<String> {
        let error = self.error.as_ref()?;
        Some(format!("what listens on {} is not taken for kubelet ({error}): dials to it are refused", self.address))
    }
}

impl Checked {
    fn result(&self) -> Result<(), CheckError> {
        self.refusal.as_ref().map_or(Ok(()), |refusal| Err(CheckError::Refused(Arc::clone(refusal))))
    }

    fn state(&self, address: SocketAddr) -> CertificateState {
        CertificateState {
            address,
            checked: self.time.clone(),
            sha256: self.sha256.map(hex),
            error: self.refusal.as_ref().map(|refusal| refusal.words()),
        }
    }
}

fn is_fresh(before: &Checked, stamp: Option<&Stamp>) -> bool {
    let age = before.at.elapsed();
    if before.refusal.is_some() {
        return age < REFUSED && before.stamp.as_ref() == stamp;
    }
    // If the kernel does not say who listens, every dial has its own check.
    age < HELD && stamp.is_some() && before.stamp.as_ref() == stamp
}

fn stamp(address: SocketAddr, demand: &CertificateDemand) -> Option<Stamp> {
    let listeners = sock_diag::listeners(address.port());
    let listeners = listeners.inspect_err(|error| tracing::debug!(%error, "cannot tell which sockets listen")).ok()?;
    Some(Stamp { listeners, ca: demand.ca.as_deref().and_then(file_stamp) })
}

fn file_stamp(path: &Path) -> Option<(u64, u64, u64, i64, i64)> {
    let about = std::fs::metadata(path).ok()?;
    Some((about.dev(), about.ino(), about.size(), about.mtime(), about.mtime_nsec()))
}

/// A handshake, and not a byte more: kubelet sees a connection that ends after it.
async fn handshake(stream: TcpStream, address: SocketAddr, demand: &CertificateDemand) -> Shown {
    let name = match &demand.name {
        Some(name) => ServerName::try_from(name.clone()).unwrap_or(ServerName::IpAddress(address.ip().into())),
        None => ServerName::IpAddress(address.ip().into()),
    };
    let (verifier, config) = match certificate::client(demand) {
        Ok(client) => client,
        Err(refusal) => return Shown { sha256: None, refusal: Some(refusal) },
    };
    let refusal = match TlsConnector::from(Arc::new(config)).connect(name, stream).await {
        Ok(_stream) => None,
        Err(error) => Some(explain(&error, demand, address)),
    };
    Shown { sha256: verifier.judge.seen(), refusal }
}

/// Logs what changed since the last check, once.
fn report(address: SocketAddr, before: Option<&Checked>, shown: &Shown) {
    let sha256 = shown.sha256.map(hex);
    let error = shown.refusal.as_ref().map(CertificateRefusal::words);
    let before = before.map(|before| before.state(address));
    match (&error, before) {
        (Some(error), before) if before.as_ref().is_none_or(|before| before.error.as_ref() != Some(error)) => {
            tracing::error!(%address, sha256, error, "the serving certificate is not what the policy asks for: dials to it are refused");
        }
        (None, Some(before)) if before.error.is_some() => {
            tracing::warn!(%address, sha256, "the serving certificate holds again")
        }
        (None, Some(before)) if before.sha256 != sha256 => {
            tracing::info!(%address, sha256, "a new serving certificate, which holds")
        }
        (None, None) => tracing::info!(%address, sha256, "the serving certificate holds"),
        (Some(_), _) | (None, Some(_)) => {}
    }
}

fn hex(bytes: [u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
