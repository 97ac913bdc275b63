//! Enforcement outlives the daemon until somebody says `nodeguard unpin`, which tells what is open then.

use lab::{
    client::Outcome,
    lab::{Lab, POLICY},
    net::Who,
};

#[test]
fn sigterm_ends_it_well_the_kernel_half_stays_and_unpin_removes_it() {
    let mut lab = Lab::new(POLICY).unwrap();
    let stranger = |lab: &Lab| lab.healthz(Who::Stranger, false).unwrap();
    let said = lab.daemon().unwrap().said("unpin", &[]).unwrap();
    assert!(said.code != 0 && said.error.contains("stop it first"));
    assert!(lab.daemon().unwrap().process.stop().unwrap().success(), "SIGTERM is exit 0");
    assert_eq!(stranger(&lab), Outcome::NoAnswer);

    // Nobody answers, so `status` says what the pins say, with its own exit code.
    let said = lab.daemon().unwrap().said("status", &[]).unwrap();
    let text = said.text();
    assert_eq!(said.code, 3, "{text}");
    assert!(text.contains("Holding:    yes") && text.contains("no-selector"), "{text}");

    let said = lab.daemon().unwrap().said("unpin", &[]).unwrap();
    let text = said.text();
    assert!(said.code == 0 && text.contains("node ports 10250") && text.contains("pod ports 8080"), "{text}");
    assert_eq!(stranger(&lab), Outcome::Http(200));
    let said = lab.daemon().unwrap().said("unpin", &[]).unwrap();
    assert!(said.text().contains("Nothing is pinned"));
}

#[test]
fn without_a_policy_nothing_is_attached_and_the_error_says_where() {
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(&POLICY.replace("10250", "102500")).unwrap();
    let error = format!("{:#}", lab.start_daemon().map(|_| ()).unwrap_err());
    assert!(error.contains("NG006") && error.contains("policy.yaml:9:22"), "{error}");
    assert_eq!(lab.healthz(Who::Stranger, false).unwrap(), Outcome::Http(200));
}
