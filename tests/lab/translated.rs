//! Something on the node translates the address of a dial after it was judged: the dial is refused before a byte passes.

use std::time::{Duration, Instant};

use lab::{
    client::{Outcome, http, https, through},
    lab::{Lab, POLICY},
    net::Who,
    process::run_tool,
};

/// Leads connections that start on the node elsewhere, as kube-proxy does for a Service with `externalIPs`. These rules replace those from before.
fn translate(lab: &Lab, rules: &[&str]) {
    let chain = format!("chain output {{\ntype nat hook output priority -100\n{}\n}}", rules.join("\n"));
    let text = format!("table ip translated\ndelete table ip translated\ntable ip translated {{\n{chain}\n}}\n");
    lab.net.run(Who::Node, || run_tool("nft", &["-f", "-"], &text).map(drop)).unwrap();
}

/// What the control plane is told of a dial that is refused, and under which reason it counts.
fn refused(lab: &mut Lab, to: &str) -> (String, String) {
    let text = match through(lab.server().unwrap(), to) {
        Err(Outcome::NotConnected(502, text)) => text,
        other => panic!("{to}: {:?}", other.map(drop)),
    };
    let status = lab.daemon().unwrap().status().unwrap();
    let last = status.last_refused_dials.last().unwrap();
    assert_eq!(last.requested, to);
    (last.reason.clone().into_owned(), text)
}

#[test]
fn a_dial_that_is_led_elsewhere_is_refused_and_a_held_check_does_not_cover_it() {
    let mut lab = Lab::bare().unwrap();
    let ca = lab.certs.path("ca.crt");
    let node = format!(
        "- {{node: {{ports: [10250]}}, certificate: {{ca: {}}}}}\n      - node: {{ports: [7001]}}",
        ca.display()
    );
    lab.write_policy(&POLICY.replace("- node: {ports: [10250, 7001]}", &node)).unwrap();
    lab.start_server(lab::certs::ServerCert::Good).unwrap();
    lab.start_daemon().unwrap().connected().unwrap();
    let get = |lab: &Lab, to: &str| https(through(lab.server().unwrap(), to), "/healthz", &ca);
    let pod = |lab: &Lab| http(through(lab.server().unwrap(), "10.244.1.2:8080"), "/");
    assert_eq!((get(&lab, "10.0.0.2:10250"), pod(&lab)), (Outcome::Http(200), Outcome::Http(200)));

    // Kubelet's port leads to a pod's open port, within the time that the check of kubelet's certificate is held.
    let started = Instant::now();
    translate(&lab, &["ip daddr 10.0.0.2 tcp dport 10250 dnat to 10.244.1.2:8081"]);
    let (reason, text) = refused(&mut lab, "10.0.0.2:10250");
    assert_eq!(reason, "translated", "{text}");
    assert!(text.contains("ends elsewhere"), "{text}");
    // Another port of the node itself, and a port without a certificate.
    translate(
        &lab,
        &[
            "ip daddr 10.0.0.2 tcp dport 10250 redirect to :7001",
            "ip daddr 10.0.0.2 tcp dport 7001 dnat to 10.244.1.2:8081",
        ],
    );
    assert_eq!(refused(&mut lab, "10.0.0.2:10250").0, "translated");
    assert_eq!(refused(&mut lab, "10.0.0.2:7001").0, "translated");
    assert!(started.elapsed() < Duration::from_secs(20), "the check is no longer held: {:?}", started.elapsed());
    let checks = lab.daemon().unwrap().status().unwrap().dialling.certificate_checks;
    assert_eq!((checks.held, checks.refused), (1, 0), "one check held all the time");

    // A pod's port leads to another one of the pod: connection tracking knows.
    translate(&lab, &["ip daddr 10.244.1.2 tcp dport 8080 dnat to 10.244.1.2:8081"]);
    let (reason, text) = refused(&mut lab, "10.244.1.2:8080");
    assert_eq!(reason, "translated", "{text}");
    assert!(text.contains("it ends at 10.244.1.2:8081"), "{text}");
    assert_eq!(lab.daemon().unwrap().status().unwrap().dialling.totals.count("refused", "translated"), 4);

    // Rules for others, or none: everything is as before.
    translate(&lab, &["ip daddr 10.9.9.9 tcp dport 80 dnat to 10.244.1.2:8081"]);
    assert_eq!((get(&lab, "10.0.0.2:10250"), pod(&lab)), (Outcome::Http(200), Outcome::Http(200)));
    translate(&lab, &[]);
    for to in ["10.0.0.2:10250", "[fd00::2]:10250"] {
        assert_eq!(get(&lab, to), Outcome::Http(200), "{to}");
    }
    assert_eq!(pod(&lab), Outcome::Http(200));
}
