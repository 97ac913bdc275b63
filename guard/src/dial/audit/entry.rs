//! Owns the record of every dial: one for each, to the log, to a file on request, and into the totals.
//! Called by `dial`, which begins an entry with each DIAL_REQ; `metrics` and `status` read the totals.
//! Must never hold up a dial: what cannot be written is counted and told.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cluster::services::view::Name,
    dial::{
        audit::{
            file::{AuditFile, FileConfig, FileState},
            record::{Record, Verdict},
            totals::Totals,
        },
        relay::Relayed,
    },
    sys::lock::lock,
};

/// How much of what the control plane wrote is kept.
const REQUESTED: usize = 300;

/// Where records go.
pub struct Audit {
    totals: Mutex<Totals>,
    file: Option<AuditFile>,
}

impl Audit {
    /// With a file, if one is wanted.
    pub fn start(file: Option<FileConfig>) -> io::Result<Arc<Audit>> {
        Ok(Audit::new(file.map(AuditFile::start).transpose()?))
    }

    /// With a file or without.
    pub fn new(file: Option<AuditFile>) -> Arc<Audit> {
        Arc::new(Audit { totals: Mutex::default(), file })
    }

    /// A dial was asked for. Whatever becomes of the entry, it is written once.
    pub fn begin(self: &Arc<Audit>, server: &str, requested: &str) -> Entry {
        let record = Record {
            time: format!("{:.3}", jiff::Timestamp::now()),
            server: cut(server).to_owned(),
            requested: cut(requested).to_owned(),
            dialled: None,
            service: None,
            rule: None,
            verdict: Verdict::Abandoned,
            reason: "ended",
            message: None,
            to_backend: 0,
            to_control_plane: 0,
            milliseconds: 0,
        };
        Entry { audit: Arc::clone(self), record, started: Instant::now(), opened: None }
    }

    /// The totals so far.
    pub fn totals(&self) -> Totals {
        lock(&self.totals).clone()
    }

    /// How the file does, if there is one.
    pub fn file(&self) -> Option<FileState> {
        self.file.as_ref().map(AuditFile::state)
    }

    /// Opens the file anew with each SIGHUP, as tools expect that moved it away.
    pub async fn follow_hangups(self: Arc<Audit>) -> io::Result<()> {
        let mut hangups = signal(SignalKind::hangup())?;
        while hangups.recv().await.is_some() {
            if let Some(file) = &self.file {
                file.reopen();
            }
        }
        Ok(())
    }

    /// Writes what is under way; for a bounded time.
    pub fn finish(&self) {
        if let Some(file) = &self.file {
            file.finish();
        }
    }
}

/// The record of a dial under way. Dropping it writes it.
pub struct Entry {
    audit: Arc<Audit>,
    record: Record,
    started: Instant,
    opened: Option<Instant>,
}

impl Entry {
    /// An address was judged.
    pub fn judged(&mut self, address: SocketAddr, rule: Option<&str>) {
        self.record.dialled = Some(address);
        self.record.rule = rule.map(str::to_owned);
    }

    /// The address that was judged is an endpoint of this Service, or of none.
    pub fn behind(&mut self, service: Option<&Name>) {
        self.record.service = service.map(Name::to_string);
    }

    /// What was asked for, as far as it is kept.
    pub fn requested(&self) -> &str {
        &self.record.requested
    }

    /// The address that was judged last.
    pub fn address(&self) -> Option<SocketAddr> {
        self.record.dialled
    }

    /// The dial is open: it counts as admitted from now on.
    pub fn open(&mut self) {
        self.record.verdict = Verdict::Admitted;
        self.opened = Some(Instant::now());
        lock(&self.audit.totals).opened(self.started.elapsed());
    }

    /// It was open, and has ended.
    pub fn closed(mut self, relayed: &Relayed) {
        self.record.to_backend = relayed.to_backend;
        self.record.to_control_plane = relayed.to_control_plane;
        self.record.reason = relayed.reason.name();
    }

    /// It came to nothing; `message` is the answer, if there was one.
    pub fn ended(mut self, verdict: Verdict, reason: &'static str, message: Option<&str>) {
        self.record.verdict = verdict;
        self.record.reason = reason;
        self.record.message = message.map(str::to_owned);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.record.milliseconds = milliseconds(self.started.elapsed());
        let record = &self.record;
        lock(&self.audit.totals).ended(record, self.opened.map(|opened| opened.elapsed()));
        let Record { server, requested, dialled, service, rule, reason, message, to_backend, to_control_plane, .. } =
            record;
        let (dialled, rule) = (dialled.map(|address| address.to_string()), rule.as_deref());
        let service = service.as_deref();
        let (verdict, milliseconds, message) = (record.verdict.name(), record.milliseconds, message.as_deref());
        match record.verdict {
            Verdict::Admitted | Verdict::Abandoned => {
                tracing::info!(target: "audit", verdict, server, requested, dialled, service, rule, to_backend, to_control_plane, milliseconds, reason, "dial closed");
            }
            Verdict::Refused => {
                tracing::warn!(target: "audit", verdict, server, requested, dialled, service, reason, message, milliseconds, "dial refused");
            }
            Verdict::Failed => {
                tracing::warn!(target: "audit", verdict, server, requested, dialled, service, rule, reason, message, milliseconds, "dial failed");
            }
        }
        if let Some(file) = &self.audit.file {
            file.write(record);
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The beginning of a text, on a character's boundary.
fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(REQUESTED)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dial::connections::CloseReason;

    #[test]
    fn an_entry_is_written_once_whatever_becomes_of_it() {
        let audit = Audit::new(None);
        drop(audit.begin("s", "a:1"));
        let mut open = audit.begin("s", "a:1");
        open.judged("10.0.0.1:1".parse().unwrap(), Some("tunnel.dial[0]"));
        open.open();
        open.closed(&Relayed { to_backend: 3, to_control_plane: 4, reason: CloseReason::Stalled });
        let mut cut_off = audit.begin("s", "a:1");
        cut_off.open();
        drop(cut_off);
        audit.begin("s", "a:1").ended(Verdict::Refused, "loopback", Some("no"));
        audit.begin("s", "a:1").ended(Verdict::Failed, "timeout", Some("i/o timeout"));
        let totals = audit.totals();
        let count = |verdict, reason| totals.count(verdict, reason);
        assert_eq!(count("admitted", "open"), 2);
        assert_eq!((count("abandoned", "ended"), count("refused", "loopback"), count("failed", "timeout")), (1, 1, 1));
        assert_eq!((totals.closes("stalled"), totals.closes("ended")), (1, 1));
        assert_eq!((totals.to_backend, totals.to_control_plane, totals.records), (3, 4, 5));
    }

    #[test]
    fn a_long_request_is_cut_on_a_character() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"é".repeat(300)).len(), REQUESTED);
        assert_eq!(cut(&format!("a{}", "é".repeat(300))).len(), REQUESTED - 1);
    }
}
