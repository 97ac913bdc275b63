//! Owns where the record of a dial goes when it ends: to the log, to the audit file if there is one, and into the totals.
//! Called by `serve`, which begins a record with each DIAL_REQ; `report` reads the totals.
//! Must never write two records for a dial, nor none.

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
            record::{DialOutcome, Record},
            totals::Totals,
        },
        relay::Relayed,
    },
    sys::lock::lock,
};

/// How many bytes of a text of the control plane are kept.
const REQUESTED: usize = 300;

/// Where records go.
pub struct Audit {
    totals: Mutex<Totals>,
    file: Option<AuditFile>,
}

impl Audit {
    /// Starts the audit file if one is configured.
    pub fn start(file: Option<FileConfig>) -> io::Result<Arc<Audit>> {
        Ok(Audit::new(file.map(AuditFile::start).transpose()?))
    }

    /// With a file or without.
    pub fn new(file: Option<AuditFile>) -> Arc<Audit> {
        Arc::new(Audit { totals: Mutex::default(), file })
    }

    /// Begins the record of a dial that was requested. Whatever becomes of the dial, its record is written once.
    pub(crate) fn begin(self: &Arc<Audit>, server: &str, requested: &str) -> Recorder {
        let record = Record {
            time: format!("{:.3}", jiff::Timestamp::now()),
            server: cut(server).to_owned(),
            requested: cut(requested).to_owned(),
            dialled: None,
            service: None,
            rule: None,
            outcome: DialOutcome::Abandoned,
            reason: "ended",
            message: None,
            to_backend: 0,
            to_control_plane: 0,
            milliseconds: 0,
        };
        Recorder { audit: Arc::clone(self), record, started: Instant::now(), opened: None, written: false }
    }

    /// The totals so far.
    pub fn totals(&self) -> Totals {
        lock(&self.totals).clone()
    }

    /// The state of the audit file, if there is one.
    pub fn file(&self) -> Option<FileState> {
        self.file.as_ref().map(AuditFile::state)
    }

    /// Reopens the file on SIGHUP, as logrotate expects.
    pub async fn follow_hangups(self: Arc<Audit>) -> io::Result<()> {
        let mut hangups = signal(SignalKind::hangup())?;
        while hangups.recv().await.is_some() {
            if let Some(file) = &self.file {
                file.reopen();
            }
        }
        Ok(())
    }

    /// Waits until the queued records are written, for a bounded time.
    pub fn finish(&self) {
        if let Some(file) = &self.file {
            file.finish();
        }
    }
}

/// The record of a dial that has not ended. Dropping it writes it, unless it is written already.
pub(crate) struct Recorder {
    audit: Arc<Audit>,
    record: Record,
    started: Instant,
    opened: Option<Instant>,
    written: bool,
}

impl Recorder {
    /// An address was judged.
    pub(crate) fn judged(&mut self, address: SocketAddr, rule: Option<&str>) {
        self.record.dialled = Some(address);
        self.record.rule = rule.map(str::to_owned);
    }

    /// The judged address is an endpoint of this Service, or of none.
    pub(crate) fn behind(&mut self, service: Option<&Name>) {
        self.record.service = service.map(Name::to_string);
    }

    /// What was requested, as far as it is kept.
    pub(crate) fn requested(&self) -> &str {
        &self.record.requested
    }

    /// The address that was judged last.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.record.dialled
    }

    /// The dial is open. It counts as admitted from now on.
    pub(crate) fn opened(&mut self) {
        self.record.outcome = DialOutcome::Admitted;
        self.opened = Some(Instant::now());
        lock(&self.audit.totals).opened(self.started.elapsed());
    }

    /// The dial was open and has ended.
    pub(crate) fn closed(&mut self, relayed: &Relayed) {
        self.record.to_backend = relayed.to_backend;
        self.record.to_control_plane = relayed.to_control_plane;
        self.record.reason = relayed.reason.name();
    }

    /// The dial came to nothing; `message` is the answer, if there is one. Written at once: whoever reads the answer finds the record.
    pub(crate) fn failed(&mut self, outcome: DialOutcome, reason: &'static str, message: Option<&str>) {
        self.record.outcome = outcome;
        self.record.reason = reason;
        self.record.message = message.map(str::to_owned);
        self.write();
    }

    fn write(&mut self) {
        if std::mem::replace(&mut self.written, true) {
            return;
        }
        self.record.milliseconds = milliseconds(self.started.elapsed());
        let record = &self.record;
        lock(&self.audit.totals).ended(record, self.opened.map(|opened| opened.elapsed()));
        let Record { server, requested, dialled, service, rule, reason, message, to_backend, to_control_plane, .. } =
            record;
        let (dialled, rule) = (dialled.map(|address| address.to_string()), rule.as_deref());
        let service = service.as_deref();
        // In the log, `message` is the name of the line.
        let (verdict, milliseconds, answer) = (record.outcome.name(), record.milliseconds, message.as_deref());
        match record.outcome {
            DialOutcome::Admitted | DialOutcome::Abandoned => {
                tracing::info!(target: "audit", verdict, server, requested, dialled, service, rule, to_backend, to_control_plane, milliseconds, reason, "dial closed");
            }
            DialOutcome::Refused => {
                tracing::warn!(target: "audit", verdict, server, requested, dialled, service, reason, answer, milliseconds, "dial refused");
            }
            DialOutcome::Failed => {
                tracing::warn!(target: "audit", verdict, server, requested, dialled, service, rule, reason, answer, milliseconds, "dial failed");
            }
        }
        if let Some(file) = &self.audit.file {
            file.write(record);
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.write();
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The beginning of a text, cut at a character boundary.
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
        open.opened();
        open.closed(&Relayed { to_backend: 3, to_control_plane: 4, reason: CloseReason::Stalled });
        drop(open);
        let mut cut_off = audit.begin("s", "a:1");
        cut_off.opened();
        drop(cut_off);
        audit.begin("s", "a:1").failed(DialOutcome::Refused, "loopback", Some("no"));
        audit.begin("s", "a:1").failed(DialOutcome::Failed, "timeout", Some("i/o timeout"));
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
