//! A guard with `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_PERFMON`, as a user that can gain nothing more, does all that docs/capabilities.md says.

use lab::{
    daemon::{Rights, USER},
    lab::{KUBELET, Lab, POLICY},
    main_job::main_job,
    net::Who,
    table::Table,
};

use crate::{drift, edge, edits, established, kill, shapes};

fn three(policy: &str) -> Lab {
    checked(Lab::with(policy, Rights::Three).unwrap())
}

/// That it has these rights and no others.
fn checked(mut lab: Lab) -> Lab {
    let id = lab.daemon().unwrap().process.id();
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!(line("Uid:").split_whitespace().next(), Some(USER.to_string().as_str()));
    let three = "000000c000001000";
    for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapAmb:"] {
        assert_eq!(line(set), three, "{set}");
    }
    assert_eq!(line("NoNewPrivs:"), "1");
    lab
}

#[test]
fn the_main_job_needs_no_more() {
    let mut lab = three(POLICY);
    let mut table = Table::default();
    main_job(&mut lab, &mut table).unwrap();
    assert_eq!(table.sum().unwrap().1, [""; 0]);
    let weakened = lab.daemon().unwrap().status().unwrap().weakened;
    // A lab is not the machine's network namespace, and it takes no capability to see that.
    assert_eq!(weakened.len(), 2, "{weakened:?}");
    assert!(weakened[0].message.contains("another network namespace"), "{weakened:?}");
    assert!(weakened[1].message.contains("CAP_SYS_ADMIN and CAP_SYS_PTRACE"), "{weakened:?}");
}

#[test]
fn a_kill_and_an_adoption_need_no_more() {
    kill::around_a_kill_9(three(POLICY));
}

#[test]
fn mending_drift_needs_no_more() {
    drift::is_mended(checked(shapes::lab_with(Rights::Three)));
}

#[test]
fn edits_need_no_more() {
    edits::come_into_force(three(POLICY));
}

#[test]
fn the_edge_tier_needs_no_more() {
    edge::drops_strangers(three(&edge::with_edge(POLICY, "eth0")));
}

#[test]
fn cutting_in_the_nodes_own_namespace_needs_no_more() {
    let mut lab = three(&POLICY.replace(", except: [10.0.8.66/32]", ""));
    let kubelet = Who::Node.at(false, KUBELET);
    let [excepted, peer] = [Who::Excepted, Who::Peer].map(|who| established::hold(&lab, who, kubelet));
    lab.write_policy(POLICY).unwrap();
    assert!(established::is_cut(&excepted), "a withdrawn peer goes on");
    assert!(!established::is_cut(&peer), "the other one was cut");
    assert_eq!(lab.daemon().unwrap().status().unwrap().cut, 1);
}
