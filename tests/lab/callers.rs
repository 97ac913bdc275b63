//! Local processes by their cgroup: who is named is admitted, on loopback as well, and nobody else on the node is.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use lab::{
    helper::Answer,
    lab::{Lab, POLICY},
    net::Who,
    process::until,
};

/// How soon a cgroup that was made anew is known.
const FOLLOWED: Duration = Duration::from_secs(2);

fn policy() -> String {
    let caller = "        - tunnel: {}\n        - caller: {cgroup: /system/kubelet.service}\n";
    POLICY.replace("        - tunnel: {}\n", caller)
}

fn kubelet() -> [SocketAddr; 3] {
    ["127.0.0.1:10250", "10.0.0.2:10250", "[fd00::2]:10250"].map(|text| text.parse().unwrap())
}

#[test]
fn a_caller_is_admitted_by_its_cgroup_wherever_it_is_made_anew() {
    let mut lab = Lab::new(&policy()).unwrap();
    let [loopback, ..] = kubelet();
    assert_eq!(lab.once(Who::Node, "", "tcp", loopback).unwrap(), Answer::NoAnswer, "loopback is no free pass");
    for cgroup in ["system/kubelet.service/inner", "system/kubelet.service2"] {
        lab.make_cgroup(cgroup).unwrap();
    }
    for to in kubelet() {
        admitted_soon(&lab, "system/kubelet.service", to);
        admitted_soon(&lab, "system/kubelet.service/inner", to);
        for cgroup in ["", "system", "system/kubelet.service2"] {
            assert_eq!(lab.once(Who::Node, cgroup, "tcp", to).unwrap(), Answer::NoAnswer, "{cgroup} -> {to}");
        }
    }
    let status = lab.daemon().unwrap().status().unwrap();
    let counted = |rule: &str| {
        status.counters.iter().find(|counter| counter.rule == rule && counter.reason == "caller").unwrap().packets
    };
    assert!(counted("kubelet") >= 6, "{:?}", status.counters);

    // A named process is admitted from a pod's network namespace too: what counts is who it is.
    let node = Who::Node.at(false, 10_250);
    assert_eq!(lab.once(Who::Pod, "system/kubelet.service", "tcp", node).unwrap(), Answer::Reached);
    assert_eq!(lab.once(Who::Pod, "system", "tcp", node).unwrap(), Answer::NoAnswer);

    // A restart: the cgroup goes and comes, with another id each time.
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        lab.remove_cgroup("system/kubelet.service/inner").unwrap();
        lab.remove_cgroup("system/kubelet.service").unwrap();
        lab.make_cgroup("system/kubelet.service/inner").unwrap();
        longest = longest.max(admitted_soon(&lab, "system/kubelet.service", loopback));
    }
    println!("callers: admitted at most {longest:.0?} after the cgroup was made anew");
    let status = lab.daemon().unwrap().status().unwrap();
    assert_eq!((status.mended, status.policy.epoch), (0, 1), "following a cgroup needs no new ruleset");
}

#[test]
fn a_withdrawn_callers_connection_is_cut() {
    let mut lab = Lab::bare().unwrap();
    lab.make_cgroup("system/kubelet.service").unwrap();
    lab.write_policy(&policy()).unwrap();
    lab.start_daemon().unwrap();
    let log = lab.start_in(Who::Node, "system/kubelet.service", &["hold", "127.0.0.1:10250"]).unwrap();
    let ended = || std::fs::read_to_string(&log).unwrap().contains("ended");
    // An edit that leaves the caller leaves its connection.
    lab.write_policy(&policy().replace("10.0.8.66/32", "10.0.8.67/32")).unwrap();
    lab.daemon().unwrap().in_force_after(1).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert!(!ended(), "an edit that keeps the caller cut it");
    lab.write_policy(POLICY).unwrap();
    until("the withdrawn caller is cut", Duration::from_secs(1), || Ok(ended())).unwrap();
}

/// Tries until it is admitted; how long that took.
fn admitted_soon(lab: &Lab, cgroup: &str, to: SocketAddr) -> Duration {
    let started = Instant::now();
    until(cgroup, FOLLOWED, || Ok(lab.once(Who::Node, cgroup, "tcp", to)? == Answer::Reached)).unwrap();
    started.elapsed()
}
