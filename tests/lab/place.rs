//! A guard that is started where it cannot guard the machine says so.

use lab::lab::{Lab, POLICY};
use nodeguard::report::weakness::WeaknessReason;

#[test]
fn another_network_namespace_than_the_machines_is_reported() {
    // Every lab is one: its node is not the machine.
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(POLICY).unwrap();
    let daemon = lab.start_daemon().unwrap();
    let weakened = daemon.status().unwrap().weakened;
    let found = weakened.iter().find(|weakness| weakness.reason == WeaknessReason::OtherNetworkNamespace);
    assert!(found.is_some_and(|weakness| weakness.message.contains("hostNetwork: true")), "{weakened:?}");
    assert!(daemon.said("status", &[]).unwrap().text().starts_with("WEAKENED: "), "the first lines say so");
    // The lab names its cgroup, which is below the root on purpose.
    assert!(!weakened.iter().any(|weakness| weakness.reason == WeaknessReason::CgroupBelowRoot), "{weakened:?}");
}
