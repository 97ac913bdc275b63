//! A guarded port is closed at every address, to every sender: what was found open from outside, and its siblings.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use lab::{
    helper::{Answer, ONCE, exchange, udp_once},
    lab::{KUBELET, Lab, POLICY},
    net::Who,
};

const DNS: u16 = 5353;

/// The lab's policy with a UDP port of the node and of pods.
fn with_dns(node: &str, pods: &str) -> String {
    let rules = format!(
        "    - {{name: dns, node: {{ports: [{DNS}], protocol: UDP}}, allow: [{node}]}}\n    - {{name: pod-dns, pods: {{cidrs: [10.244.1.0/24], ports: [{DNS}], protocol: UDP}}, allow: [{pods}]}}\n  tunnel:\n    dial:"
    );
    POLICY.replace("  tunnel:\n    dial:", &rules)
}

fn bare(policy: &str) -> Lab {
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(policy).unwrap();
    lab.start_daemon().unwrap();
    lab
}

fn link_local(lab: &Lab, who: Who, seen_from: Who, interface: &str) -> SocketAddr {
    let address = lab
        .net
        .run(who, || {
            let all = nix::ifaddrs::getifaddrs()?.filter(|each| each.interface_name == "eth0");
            let v6 = all.filter_map(|each| Some(each.address?.as_sockaddr_in6()?.ip()));
            Ok(v6.into_iter().find(|address| address.is_unicast_link_local()).unwrap())
        })
        .unwrap();
    let index = lab.net.run(seen_from, || Ok(nix::net::if_::if_nametoindex(interface)?)).unwrap();
    std::net::SocketAddrV6::new(address, 8080, 0, index).into()
}

#[test]
fn a_forged_datagram_opens_nothing_to_anybody() {
    let mut lab = bare(&with_dns("node: {}", ""));
    for who in [Who::Node, Who::Pod] {
        lab.start_in(who, "", &["echo", &format!("[::]:{DNS}")]).unwrap();
    }
    let stranger = Who::Stranger.at(false, 7777);
    // From a pod, and from a raw socket of the node itself: neither is the socket that is guarded.
    for (forger, victim) in [(Who::Pod, Who::Node), (Who::Node, Who::Node), (Who::Pod, Who::Pod), (Who::Node, Who::Pod)]
    {
        let victim = victim.at(false, DNS);
        let words = ["attack", "forge", &victim.to_string(), &stranger.to_string()];
        lab.ask::<Answer>(forger, "", &words).unwrap();
        // Made only now: the forged datagram is for nobody.
        let asking = lab.net.run(Who::Stranger, || Ok(UdpSocket::bind(stranger)?)).unwrap();
        assert_eq!(exchange(&asking, victim, ONCE).unwrap(), Answer::NoAnswer, "{forger:?} opened {victim}");
    }
    // In a pod, what the node itself would send to its own port.
    let (own, to) = (Who::Node.at(false, 7778), Who::Node.at(false, DNS));
    lab.ask::<Answer>(Who::Pod, "", &["attack", "forge", &own.to_string(), &to.to_string()]).unwrap();
    let spoofed = "10.0.0.2:7778";
    let as_node = lab.ask::<Answer>(Who::Node, "", &["send-first", spoofed, &to.to_string()]).unwrap();
    assert_eq!(as_node, Answer::Reached, "a pod's forgery denies the node its own port");
    // Whoever in the node has that very port at another moment is the node, too; a stranger is not.
    let stranger_once = lab.net.run(Who::Stranger, || udp_once(to)).unwrap();
    assert_eq!(stranger_once, Answer::NoAnswer);
}

#[test]
fn a_later_owner_of_a_callers_port_is_nobody() {
    let mut lab = Lab::bare().unwrap();
    lab.make_cgroup("named").unwrap();
    lab.make_cgroup("other").unwrap();
    lab.write_policy(&with_dns("caller: {cgroup: /named}", "caller: {cgroup: /named}")).unwrap();
    lab.start_daemon().unwrap();
    for who in [Who::Node, Who::Pod] {
        lab.start_in(who, "", &["echo", &format!("[::]:{DNS}")]).unwrap();
    }
    for to in [Who::Node.at(false, DNS), Who::Pod.at(false, DNS)] {
        for round in 0..5 {
            let words = ["send-first", "10.0.0.2:4444", &to.to_string()];
            assert_eq!(lab.ask::<Answer>(Who::Node, "named", &words).unwrap(), Answer::Reached, "{to} {round}");
            assert_eq!(lab.ask::<Answer>(Who::Node, "other", &words).unwrap(), Answer::NoAnswer, "{to} {round}");
        }
    }
}

#[test]
fn a_pods_port_is_guarded_at_each_of_its_addresses() {
    let lab = bare(&POLICY.replace(
        "[10.244.1.0/24, 'fd01:244:1::/64'], ports: [8080]}\n      allow",
        "[10.244.1.0/24], ports: [8080]}\n      allow",
    ));
    lab.net.ip(Who::Pod, &["address", "add", "192.168.50.5/24", "dev", "eth0"]).unwrap();
    lab.net.ip(Who::Node, &["address", "add", "192.168.50.1/24", "dev", "pod0"]).unwrap();
    let local = link_local(&lab, Who::Pod, Who::Node, "pod0");
    let second: SocketAddr = "192.168.50.5:8080".parse().unwrap();
    for mut to in [Who::Pod.at(false, 8080), second, Who::Pod.at(true, 8080), local] {
        assert_eq!(lab.once(Who::Node, "", "tcp", to).unwrap(), Answer::NoAnswer, "{to}");
        to.set_port(8081);
        assert_eq!(lab.once(Who::Node, "", "tcp", to).unwrap(), Answer::Reached, "{to} is not guarded");
    }
}

#[test]
fn a_pod_outside_of_every_prefix_is_left_alone() {
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(&POLICY.replace(
        "[10.244.1.0/24, 'fd01:244:1::/64'], ports: [8080]}\n      allow",
        "[10.244.7.0/24], ports: [8080]}\n      allow",
    ))
    .unwrap();
    lab.start_daemon().unwrap();
    for v6 in [false, true] {
        let to = Who::Pod.at(v6, 8080);
        assert_eq!(
            lab.net.run(Who::Stranger, || Ok(lab::client::http(lab::client::tcp(to), "/"))).unwrap(),
            lab::client::Outcome::Http(200),
            "{to}"
        );
    }
    // An address that makes it one of the rule's pods is seen within seconds, and counts at every address.
    lab.net.ip(Who::Pod, &["address", "add", "10.244.7.5/24", "dev", "eth0"]).unwrap();
    let to = Who::Pod.at(false, 8080);
    lab::process::until("the pod is guarded", Duration::from_secs(6), || {
        Ok(lab.once(Who::Node, "", "tcp", to)? == Answer::NoAnswer)
    })
    .unwrap();
}

#[test]
fn a_broadcast_is_judged_as_any_datagram() {
    let mut lab = bare(&with_dns("", ""));
    lab.start_in(Who::Pod, "", &["echo", &format!("0.0.0.0:{DNS}")]).unwrap();
    for to in ["10.244.1.255:5353", "255.255.255.255:5353", "224.0.0.1:5353"] {
        let words = ["attack", "broadcast", "10.244.1.1:0", to];
        assert_eq!(lab.ask::<Answer>(Who::Node, "", &words).unwrap(), Answer::NoAnswer, "{to}");
        assert_eq!(lab.once(Who::Node, "", "udp", Who::Pod.at(false, DNS)).unwrap(), Answer::NoAnswer, "after {to}");
    }
}

#[test]
fn a_pod_reaches_itself_and_the_node_does_not() {
    for cidrs in ["cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ", ""] {
        let policy = POLICY.replace(
            "pods: {cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [8080]}\n      allow",
            &format!("pods: {{{cidrs}ports: [8080]}}\n      allow"),
        );
        let mut lab = bare(&policy);
        let own = ["127.0.0.1:8080", "[::1]:8080", "10.244.1.2:8080", "[fd01:244:1::2]:8080"];
        for to in own.map(|to| to.parse().unwrap()) {
            assert_eq!(lab.once(Who::Pod, "", "tcp", to).unwrap(), Answer::Reached, "{cidrs} {to}");
        }
        let kubelet: SocketAddr = format!("127.0.0.1:{KUBELET}").parse().unwrap();
        assert_eq!(lab.once(Who::Node, "", "tcp", kubelet).unwrap(), Answer::NoAnswer, "loopback is no free pass");
        assert_eq!(lab.once(Who::Node, "", "tcp", Who::Pod.at(false, 8080)).unwrap(), Answer::NoAnswer);
        let status = lab.daemon().unwrap().status().unwrap();
        assert!(lab::daemon::packets_of(&status, Some("web"), "self") >= 4, "{:?}", status.counters);
    }
}

#[test]
fn an_address_that_comes_late_is_the_nodes() {
    let lab = bare(POLICY);
    for (address, interface) in [("10.244.1.9/32", "lo"), ("10.0.0.99/16", "eth0"), ("fd01:244:1::9/128", "lo")] {
        lab.net.ip(Who::Node, &["address", "add", address, "dev", interface]).unwrap();
        let to = SocketAddr::new(address.split('/').next().unwrap().parse().unwrap(), KUBELET);
        assert_eq!(
            lab.net.run(Who::Stranger, || Ok(lab::client::http(lab::client::tcp(to), "/"))).unwrap(),
            lab::client::Outcome::NoAnswer,
            "{to}"
        );
        assert_eq!(lab.once(Who::Pod, "", "tcp", to).unwrap(), Answer::NoAnswer, "{to}");
    }
}

/// The last bytes of addresses where nobody is: enough that each has ports left.
const NOBODY: std::ops::Range<u8> = 70..100;

#[test]
fn connections_to_nowhere_take_nobody_elses_place() {
    let policy = POLICY.replacen("        - tunnel: {}\n", "        - tunnel: {}\n        - node: {}\n", 1);
    let mut lab = Lab::new(&policy).unwrap();
    // Nobody is at these addresses; what is sent there leaves the node and is lost.
    for last in NOBODY {
        let neighbour = format!("10.0.0.{last}");
        lab.net.ip(Who::Node, &["neigh", "add", &neighbour, "lladdr", "02:00:00:00:00:01", "dev", "eth0"]).unwrap();
    }
    let to: Vec<String> = NOBODY.map(|last| format!("10.0.0.{last}:{KUBELET}")).collect();
    // More than any table of pinholes holds, by as many processes as the limit of descriptors asks for.
    let mut words = vec!["attack", "black-hole", "5000"];
    words.extend(to.iter().map(String::as_str));
    for _ in 0..14 {
        lab.start_in(Who::Node, "", &words).unwrap();
    }
    // The flood's own retransmissions keep the processor busy for moments, so an answer may take longer than one attempt waits.
    let kubelet = Who::Node.at(false, KUBELET);
    for _ in 0..20 {
        lab::process::until("the node reaches kubelet", Duration::from_secs(10), || {
            Ok(lab.once(Who::Node, "", "tcp", kubelet)? == Answer::Reached)
        })
        .unwrap();
        let through = lab.healthz_dialled(&format!("10.0.0.2:{KUBELET}")).unwrap();
        assert_eq!(through, lab::client::Outcome::Http(200), "the tunnel");
    }
    let status = lab.daemon().unwrap().status().unwrap();
    assert_eq!(lab::daemon::packets(&status, "no-selector"), 0, "an attempt was denied: {:?}", status.counters);
    let lost = status.health.iter().find(|health| health.name == "pinholes-lost").map(|health| health.count);
    assert_eq!(lost.unwrap_or(0), 0, "{:?}", status.health);
}

#[test]
fn a_socket_that_changes_hands_loses_its_role() {
    let mut lab = Lab::bare().unwrap();
    lab.make_cgroup("named").unwrap();
    lab.make_cgroup("other").unwrap();
    lab.write_policy(&POLICY.replacen("        - tunnel: {}\n", "        - caller: {cgroup: /named}\n", 1)).unwrap();
    lab.start_daemon().unwrap();
    let other = lab.guarded.join("other");
    let kubelet = Who::Node.at(false, KUBELET).to_string();
    assert_eq!(lab.once(Who::Node, "named", "tcp", Who::Node.at(false, KUBELET)).unwrap(), Answer::Reached);
    // There is no route to the first, so its connection fails before anything is sent.
    let words = ["attack", "switch", &other.display().to_string(), "203.0.113.1:80", &kubelet];
    assert_eq!(lab.ask::<Answer>(Who::Node, "named", &words).unwrap(), Answer::NoAnswer);
}
