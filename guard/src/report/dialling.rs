//! Owns what is told of dials beyond the log: totals, the audit file, checked certificates, watched Services, as data and as Prometheus text.
//! Called by the snapshots of `run` and `agent`, and by `metrics`.
//! Must never carry a label without bounds.

use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};

use crate::{
    cluster::services::feed::ServicesState,
    dial::{
        audit::{file::FileState, totals::Totals},
        kubelet::check::CertificateState,
        serve::Dialer,
    },
    sys::metrics_text::family,
};

/// What is told.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Dialling {
    /// Dials by outcome, reason, size and time.
    pub totals: Totals,
    /// The audit file, if there is one.
    pub audit_file: Option<FileState>,
    /// The serving certificates that were checked.
    pub certificates: Vec<CertificateState>,
    /// Checks by what came of them.
    pub certificate_checks: Vec<(String, u64)>,
    /// The cluster's Services, where they are watched.
    #[serde(default)]
    pub services: Option<ServicesState>,
}

impl Dialling {
    /// As of now.
    pub fn of(dialer: &Dialer) -> Dialling {
        let ruleset = dialer.connections.ruleset();
        Dialling {
            totals: dialer.audit.totals(),
            audit_file: dialer.audit.file(),
            certificates: dialer.certificates.states(ruleset.as_deref()),
            certificate_checks: dialer.certificates.counts().map(|(result, count)| (result.to_owned(), count)).to_vec(),
            services: dialer.services.state(),
        }
    }

    /// What weakens protection, a sentence each.
    pub fn weakened(&self) -> Vec<String> {
        let file = self.audit_file.as_ref().and_then(FileState::weakened);
        file.into_iter().chain(self.certificates.iter().filter_map(CertificateState::weakened)).collect()
    }

    /// Writes it in Prometheus' text format.
    pub fn encode(&self, out: &mut String) -> fmt::Result {
        self.totals.encode(out)?;
        if let Some(FileState { written, lost, error, .. }) = &self.audit_file {
            let name = "nodeguard_audit_file_records_total";
            family(out, name, "Records for the audit file, by what became of them.", "counter")?;
            writeln!(out, "{name}{{result=\"written\"}} {written}\n{name}{{result=\"lost\"}} {lost}")?;
            let name = "nodeguard_audit_file_failing";
            family(out, name, "1 where the last write to the audit file failed.", "gauge")?;
            writeln!(out, "{name} {}", u8::from(error.is_some()))?;
        }
        self.services.iter().try_for_each(|services| services.encode(out))?;
        let name = "nodeguard_kubelet_certificate_checks_total";
        family(out, name, "Checks of kubelet's serving certificate, by what came of them.", "counter")?;
        for (result, count) in &self.certificate_checks {
            writeln!(out, "{name}{{result=\"{result}\"}} {count}")?;
        }
        let refused = self.certificates.iter().filter(|certificate| certificate.error.is_some()).count();
        let name = "nodeguard_kubelet_certificates_refused";
        family(out, name, "Addresses of kubelet whose serving certificate is refused now.", "gauge")?;
        writeln!(out, "{name} {refused}")
    }
}
