//! Owns the state of dialling: totals, the audit file, checked certificates, watched Services.
//! Called by the daemon for each status.
//! Must never change anything.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    cluster::services::feed::ServicesState,
    dial::{
        audit::{file::FileState, totals::Totals},
        kubelet::check::{CertificateChecks, CertificateState},
        serve::Dialer,
    },
};

/// Dials by outcome, reason, size and time, and what they depend on.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Dialling {
    /// Dials by outcome, reason, size and time.
    pub totals: Totals,
    /// The audit file, if there is one.
    pub audit_file: Option<FileState>,
    /// The serving certificates of kubelet that were checked.
    pub certificates: Vec<CertificateState>,
    /// The number of these checks, by result.
    pub certificate_checks: CertificateChecks,
    /// The cluster's Services, if they are watched.
    pub services: Option<ServicesState>,
}

impl Dialling {
    /// The state now.
    pub fn of(dialer: &Dialer) -> Dialling {
        let ruleset = dialer.connections.ruleset();
        Dialling {
            totals: dialer.audit.totals(),
            audit_file: dialer.audit.file(),
            certificates: dialer.certificates.states(ruleset.as_deref()),
            certificate_checks: dialer.certificates.counts(),
            services: dialer.services.state(),
        }
    }
}
