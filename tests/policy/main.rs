//! `nodeguard check` as its users meet it: exit codes, excerpts, JSON, and the policies that are shipped.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::wildcard_enum_match_arm,
    reason = "a test panics and prints figures"
)]

mod deploy;

use std::{path::Path, process::Command};

use lab::{daemon::binary, process::output};

fn check(path: &Path, more: &[&str]) -> (i32, String) {
    let mut command = Command::new(binary().unwrap());
    command.arg("check").arg(path).args(more);
    let said = output(&mut command).unwrap();
    (said.code, said.text())
}

fn shipped() -> Vec<std::path::PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/policies");
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn every_shipped_policy_is_good_and_without_warnings() {
    let policies = shipped();
    assert!(!policies.is_empty());
    for path in policies {
        let (code, text) = check(&path, &[]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("is valid, 0 warnings"), "{text}");
    }
}

#[test]
fn a_broken_one_is_exit_1_with_file_line_column_and_excerpt() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.yaml");
    let good = std::fs::read_to_string(&shipped()[0]).unwrap();
    std::fs::write(&path, good.replacen("guard:", "guards:", 1)).unwrap();
    let (code, text) = check(&path, &[]);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.starts_with("error[NG003]")
            && text.contains("policy.yaml:")
            && text.contains("guards:")
            && !text.contains('\x1b'),
        "{text}"
    );

    let (code, text) = check(&path, &["-o", "json"]);
    assert_eq!(code, 1, "{text}");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["ok"], false);
    assert_eq!(report["findings"][0]["id"], "NG003");
    assert!(report["findings"][0]["line"].as_u64().unwrap() > 1);
}

#[test]
fn a_missing_file_and_a_wrong_option_have_their_own_exit_codes() {
    let (code, text) = check(Path::new("/nonexistent/policy.yaml"), &[]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("NG001") && text.contains("/nonexistent/policy.yaml"), "{text}");
    assert_eq!(check(&shipped()[0], &["--no-such-option"]).0, 2);
}
