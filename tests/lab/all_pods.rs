//! Pod ports without any prefix: a pod is known by the cgroup that it lives in.

use std::time::Duration;

use lab::{
    client::{Outcome, http, tcp},
    lab::Lab,
    net::Who,
    process::until,
};

const PORT: u16 = 8090;

/// No other rule names a prefix of pods: an address inside one is a pod's, whatever its cgroup.
const POLICY: &str = "\
apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata: {name: lab}
spec:
  mode: Enforce
  guard:
    - name: every-pod
      pods: {ports: [8090]}
      allow: [ipBlock: {cidr: 10.0.8.0/24}]
  tunnel: {dial: []}
";

#[test]
fn a_pod_is_guarded_by_its_cgroup_and_a_container_beside_it_is_not() {
    let mut lab = Lab::bare().unwrap();
    lab.make_cgroup("kubepods.slice/pod1/container").unwrap();
    lab.make_cgroup("elsewhere").unwrap();
    lab.start_in(Who::Pod, "kubepods.slice/pod1/container", &["pod", &format!("[::]:{PORT}")]).unwrap();
    lab.start_in(Who::Pod, "elsewhere", &["pod", &format!("[::]:{}", PORT + 1)]).unwrap();
    lab.start_in(Who::Node, "", &["pod", &format!("[::]:{PORT}")]).unwrap();
    lab.write_policy(&POLICY.replace("[8090]", "[8090-8091]")).unwrap();
    lab.start_daemon().unwrap();
    let from = |who: Who, to: Who, port: u16| {
        let to = to.at(false, port);
        lab.net.run(who, || Ok(http(tcp(to), "/"))).unwrap()
    };
    assert_eq!(from(Who::Stranger, Who::Pod, PORT), Outcome::NoAnswer);
    assert_eq!(from(Who::Peer, Who::Pod, PORT), Outcome::Http(200));
    assert_eq!(from(Who::Stranger, Who::Pod, PORT + 1), Outcome::Http(200), "no pod: it is in another cgroup");
    assert_eq!(from(Who::Stranger, Who::Node, PORT), Outcome::Http(200), "the node's own port is another one");
}

#[test]
fn where_the_pods_cgroup_is_not_there_every_other_listener_counts_and_status_says_so() {
    let mut lab = Lab::bare().unwrap();
    lab.make_cgroup("elsewhere").unwrap();
    lab.start_in(Who::Pod, "elsewhere", &["pod", &format!("[::]:{PORT}")]).unwrap();
    lab.write_policy(POLICY).unwrap();
    lab.start_daemon().unwrap();
    let to = Who::Pod.at(false, PORT);
    let from = |lab: &Lab, who: Who| lab.net.run(who, || Ok(http(tcp(to), "/"))).unwrap();
    assert_eq!(from(&lab, Who::Stranger), Outcome::NoAnswer, "in doubt it is a pod");
    let said = lab.daemon().unwrap().said("status", &[]).unwrap().text();
    assert!(said.contains("cgroup of the pods"), "{said}");
    lab.make_cgroup("kubepods.slice").unwrap();
    until("it is no pod", Duration::from_secs(5), || Ok(from(&lab, Who::Stranger) == Outcome::Http(200))).unwrap();
    let said = lab.daemon().unwrap().said("status", &[]).unwrap().text();
    assert!(!said.contains("cgroup of the pods"), "{said}");
}
