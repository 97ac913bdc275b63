//! The last hop: TLS where the policy wants it, and kubelet's certificate before a dial is made, with the kernel half in force.

use std::{
    io::{Read, Write},
    time::Duration,
};

use lab::{
    client::{Outcome, http, https, through},
    lab::{Lab, POLICY},
    process::until,
};

/// The lab's policy with this beside the entry of the node.
fn policy(node: &str, pods: &str) -> String {
    let node = format!("- {{node: {{ports: [10250, 7001]}}{node}}}");
    let pods = format!("- {{pods: {{cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [8080]}}{pods}}}");
    let changed = POLICY
        .replace("- node: {ports: [10250, 7001]}", &node)
        .replace("- pods: {cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [8080]}\n", &format!("{pods}\n"));
    assert!(changed.contains(&node) && changed.contains(&pods), "{changed}");
    // The entry of the node is named for each port: the bytes' port has no certificate.
    changed.replace("ports: [10250, 7001]}", "ports: [10250]}") + "      - node: {ports: [7001]}\n"
}

fn into_force(lab: &mut Lab, policy: &str) {
    lab.write_policy(policy).unwrap();
    let (daemon, name) = (lab.daemon().unwrap(), policy_name(policy));
    until("the edit is in force", Duration::from_secs(10), || Ok(daemon.status()?.policy.name == name)).unwrap();
}

fn policy_name(policy: &str) -> String {
    policy.lines().find_map(|line| line.trim().strip_prefix("name: ")).unwrap().to_owned()
}

#[test]
fn kubelets_certificate_decides_about_the_dial() {
    let mut lab = Lab::new(POLICY).unwrap();
    let ca = lab.certs.path("ca.crt");
    let named = |name: &str, certificate: &str| {
        policy(&format!(", certificate: {certificate}"), "").replace("name: lab", &format!("name: {name}"))
    };
    let get = |lab: &Lab| https(through(lab.server().unwrap(), "10.0.0.2:10250"), "/healthz", &ca);

    into_force(&mut lab, &named("good", &format!("{{ca: {}}}", ca.display())));
    for _ in 0..10 {
        assert_eq!(get(&lab), Outcome::Http(200));
    }
    let dialling = lab.daemon().unwrap().status().unwrap().dialling;
    assert_eq!(dialling.certificate_checks.held, 1, "ten dials, one check");
    assert_eq!((dialling.certificates.len(), dialling.certificates[0].error.clone()), (1, None));

    // A policy that asks for another certificate ends what is open, and admits nothing.
    let mut open = through(lab.server().unwrap(), "10.0.0.2:10250").map_err(|outcome| format!("{outcome:?}")).unwrap();
    into_force(&mut lab, &named("other", &format!("{{pins: ['sha256/{}=']}}", "A".repeat(43))));
    assert!(!matches!(open.read(&mut [0; 1]), Ok(1..)), "the open dial goes on");
    match get(&lab) {
        Outcome::NotConnected(502, text) => assert!(text.contains("its public key is none of the pins"), "{text}"),
        other => panic!("{other:?}"),
    }
    let status = lab.daemon().unwrap().status().unwrap();
    assert!(
        status.weakened.iter().any(|weakness| weakness.message.contains("not taken for kubelet")),
        "{:?}",
        status.weakened
    );
    let refused = &status.last_refused_dials.last().unwrap().reason;
    assert_eq!(refused, "kubelet-certificate");
    // Another port of the node is not asked for one.
    assert!(through(lab.server().unwrap(), "10.0.0.2:7001").is_ok());

    into_force(&mut lab, &named("name", &format!("{{ca: {}, name: node}}", ca.display())));
    assert_eq!(get(&lab), Outcome::Http(200));
    let weakened = lab.daemon().unwrap().status().unwrap().weakened;
    assert!(!weakened.iter().any(|weakness| weakness.message.contains("kubelet")), "{weakened:?}");
}

#[test]
fn a_port_that_must_be_tls_takes_nothing_plain() {
    let mut lab = Lab::new(POLICY).unwrap();
    let ca = lab.certs.path("ca.crt");
    let plain = |lab: &Lab| http(through(lab.server().unwrap(), "10.244.1.2:8080"), "/");
    assert_eq!(plain(&lab), Outcome::Http(200));
    into_force(&mut lab, &policy(", tls: Required", ", tls: Required").replace("name: lab", "name: tls"));
    // Kubelet speaks TLS, the pod does not; the client's hello is answered by plain text, which does not come back.
    assert_eq!(https(through(lab.server().unwrap(), "10.0.0.2:10250"), "/healthz", &ca), Outcome::Http(200));
    assert!(matches!(plain(&lab), Outcome::Error(_)), "{:?}", plain(&lab));
    assert!(matches!(https(through(lab.server().unwrap(), "10.244.1.2:8080"), "/", &ca), Outcome::Error(_)));
    let mut raw = through(lab.server().unwrap(), "10.0.0.2:10250").map_err(|outcome| format!("{outcome:?}")).unwrap();
    raw.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").unwrap();
    let mut back = Vec::new();
    let _ = raw.read_to_end(&mut back);
    assert!(back.is_empty(), "{}", String::from_utf8_lossy(&back));
    let totals = lab.daemon().unwrap().status().unwrap().dialling.totals;
    assert!(totals.closes("not-tls") >= 3, "{:?}", totals.closed);
}
