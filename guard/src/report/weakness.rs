//! Owns what a weakness is: a stable reason and a sentence.
//! Called by the daemon, `assess` and `stopped`; shown by `status`, counted by the metrics, named by readiness.
//! Must never rename a reason: monitoring matches it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One thing that weakens protection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Weakness {
    /// The stable name.
    pub reason: WeaknessReason,
    /// What it means, in one sentence.
    pub message: String,
}

/// Why protection is weakened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WeaknessReason {
    /// No ruleset is in force, or a program is not attached.
    NotGuarded,
    /// The daemon does not run.
    NoDaemon,
    /// The agent runs without a kernel half.
    NoKernelHalf,
    /// The agent dials anything.
    DialAnything,
    /// A program is not attached.
    ProgramDetached,
    /// The daemon is in another network namespace than the machine.
    OtherNetworkNamespace,
    /// The guarded cgroup is below the root, and nobody asked for that.
    CgroupBelowRoot,
    /// The last edit of the policy is not in force.
    PolicyEdit,
    /// The policy's mode is `Audit`.
    AuditOnly,
    /// The cgroup of the pods does not exist.
    PodsUnknown,
    /// The edge tier is not attached to an interface.
    EdgeDetached,
    /// A map is nearly full.
    MapNearlyFull,
    /// Open connections could not be judged or cut.
    Uncut,
    /// Connections of pods cannot be seen.
    PodsUnseen,
    /// The kernel programs lost something.
    KernelLoss,
    /// Records are missing from the audit file.
    AuditFile,
    /// A serving certificate is not the one that the policy asks for.
    KubeletCertificate,
    /// The certificates or the token on disk cannot be used.
    CredentialsBroken,
    /// A stream could not be replaced by one with the new credentials.
    StreamOutdated,
}

impl WeaknessReason {
    /// The stable name.
    pub fn name(self) -> &'static str {
        match self {
            WeaknessReason::NotGuarded => "not-guarded",
            WeaknessReason::NoDaemon => "no-daemon",
            WeaknessReason::NoKernelHalf => "no-kernel-half",
            WeaknessReason::DialAnything => "dial-anything",
            WeaknessReason::ProgramDetached => "program-detached",
            WeaknessReason::OtherNetworkNamespace => "other-network-namespace",
            WeaknessReason::CgroupBelowRoot => "cgroup-below-root",
            WeaknessReason::PolicyEdit => "policy-edit",
            WeaknessReason::AuditOnly => "audit-only",
            WeaknessReason::PodsUnknown => "pods-unknown",
            WeaknessReason::EdgeDetached => "edge-detached",
            WeaknessReason::MapNearlyFull => "map-nearly-full",
            WeaknessReason::Uncut => "uncut",
            WeaknessReason::PodsUnseen => "pods-unseen",
            WeaknessReason::KernelLoss => "kernel-loss",
            WeaknessReason::AuditFile => "audit-file",
            WeaknessReason::KubeletCertificate => "kubelet-certificate",
            WeaknessReason::CredentialsBroken => "credentials-broken",
            WeaknessReason::StreamOutdated => "stream-outdated",
        }
    }

    /// The weakness with this reason.
    pub fn says(self, message: impl Into<String>) -> Weakness {
        Weakness { reason: self, message: message.into() }
    }
}
