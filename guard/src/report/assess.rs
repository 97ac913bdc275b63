//! Owns the judgement of a status: everything in it that weakens protection.
//! Called by the daemon for each status.
//! Must never leave out a weakness that the status shows elsewhere.

use guard_policy::ruleset::Mode;

use crate::{
    dial::{audit::file::FileState, kubelet::check::CertificateState},
    report::{
        status::Status,
        weakness::{Weakness, WeaknessReason},
    },
};

/// From this percentage on, a map counts as nearly full.
const NEARLY_FULL: u64 = 90;
/// A map that evicts its oldest entries and therefore becomes full at some time.
const EVICTS: &str = "CONNECTING";

/// Everything that a running daemon's status shows as a weakness.
pub fn weaknesses(status: &Status) -> Vec<Weakness> {
    use WeaknessReason::{
        AuditFile, AuditOnly, CredentialsBroken, EdgeDetached, KernelLoss, KubeletCertificate, MapNearlyFull,
        PolicyEdit, ProgramDetached, StreamOutdated,
    };
    let mut all = Vec::new();
    for program in status.programs.iter().filter(|program| !program.attached) {
        all.push(ProgramDetached.says(format!("{} is not attached: guarded ports are open", program.name)));
    }
    if status.policy.last_error.is_some() {
        all.push(PolicyEdit.says("the last edit of the policy is not in force (see below)"));
    }
    if !status.programs.is_empty() && status.mode == Some(Mode::Audit) {
        all.push(AuditOnly.says("the policy only audits: nothing is denied"));
    }
    for link in status.edge.iter().filter(|link| !link.attached) {
        all.push(EdgeDetached.says(format!(
            "the edge tier is not attached to {} ({}): a flood there costs more, but everything that the policy denies stays denied",
            link.interface, link.note
        )));
    }
    for map in status.map_use.iter().filter(|map| map.percent() >= NEARLY_FULL && map.name != EVICTS) {
        all.push(MapNearlyFull.says(format!(
            "the map {} is {} % full ({} of {})",
            map.name,
            map.percent(),
            map.entries,
            map.capacity
        )));
    }
    for loss in status.health.iter().filter(|loss| loss.weakens && loss.count > 0) {
        all.push(KernelLoss.says(format!("{} {}", loss.count, loss.name)));
    }
    all.extend(status.dialling.audit_file.iter().filter_map(FileState::weakened).map(|text| AuditFile.says(text)));
    let certificates = status.dialling.certificates.iter().filter_map(CertificateState::weakened);
    all.extend(certificates.map(|text| KubeletCertificate.says(text)));
    let Some(tunnel) = &status.tunnel else { return all };
    if let Some(error) = tunnel.material.broken.as_ref().filter(|_| tunnel.material.in_use > 0) {
        all.push(CredentialsBroken.says(format!(
            "the certificates or the token on disk cannot be used; the previous ones stay in use: {error}"
        )));
    }
    for stream in &tunnel.outdated {
        all.push(StreamOutdated.says(format!(
            "the stream to {} was made with older certificates, token or revocation lists, and no stream can be made with the current ones: {}",
            stream.server, stream.error
        )));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{links::edge_hooks::EdgeLink, observe::map_use::MapUse};

    #[test]
    fn a_map_is_told_before_it_is_full() {
        let map = |name: &str, entries| MapUse { name: name.into(), entries, capacity: 100 };
        let map_use = vec![map("PORTS", 89), map("PINHOLES", 90), map("CONNECTING", 100)];
        let told = weaknesses(&Status { map_use, ..Status::default() });
        assert_eq!(told, [WeaknessReason::MapNearlyFull.says("the map PINHOLES is 90 % full (90 of 100)")]);
    }

    #[test]
    fn an_interface_without_the_edge_tier_is_told() {
        let link = |attached| EdgeLink { attached, ..EdgeLink::default() };
        let told = weaknesses(&Status { edge: vec![link(true), link(false), link(false)], ..Status::default() });
        assert_eq!(told.len(), 2);
        assert!(told.iter().all(|weakness| weakness.reason == WeaknessReason::EdgeDetached), "{told:?}");
    }
}
