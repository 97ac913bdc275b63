//! Owns the answer to "is it ready": checks by name, and remarks that do not decide.
//! Called by the daemon, which fills it, and by `admin`, which serves it.
//! Must never print what a policy document says: anybody who reaches the health port can read the answer.

use crate::report::weakness::Weakness;

/// Whether the guard does its work.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// The checks, in the order of the answer.
    pub checks: Vec<Check>,
    /// What the details say although it makes nothing unready.
    pub remarks: Vec<Weakness>,
}

/// One check.
#[derive(Clone, Debug)]
pub struct Check {
    /// The stable name.
    pub name: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// More about the result; shown after the name.
    pub detail: Option<String>,
}

impl Check {
    /// A check that says `missing` if it fails, and nothing otherwise.
    pub fn new(name: &'static str, holds: bool, missing: &str) -> Check {
        Check { name, holds, detail: (!holds).then(|| missing.to_owned()) }
    }
}

impl Readiness {
    /// Whether every check holds.
    pub fn is_ready(&self) -> bool {
        self.checks.iter().all(|check| check.holds)
    }

    /// A line for each check and remark, as Kubernetes' components write them.
    pub fn lines(&self) -> String {
        let mut lines = "[+]ping ok\n".to_owned();
        for Check { name, holds, detail } in &self.checks {
            let (sign, word) = if *holds { ('+', "ok") } else { ('-', "failed") };
            let detail = detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
            lines.push_str(&format!("[{sign}]{name} {word}{detail}\n"));
        }
        for remark in &self.remarks {
            lines.push_str(&format!("[!]{} {}\n", remark.reason.name(), remark.message));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::weakness::WeaknessReason;

    #[test]
    fn each_check_and_each_remark_has_a_line() {
        let services = Check { name: "services-read", holds: true, detail: Some("3 known".to_owned()) };
        let checks = vec![Check::new("server-connected", false, "no servers connected"), services];
        let remarks = vec![WeaknessReason::PolicyEdit.says("not in force: why")];
        let readiness = Readiness { checks, remarks };
        assert!(!readiness.is_ready());
        assert_eq!(
            readiness.lines(),
            "[+]ping ok\n[-]server-connected failed: no servers connected\n[+]services-read ok: 3 known\n[!]policy-edit not in force: why\n"
        );
    }
}
