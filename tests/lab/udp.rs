//! UDP ports: strangers get no answer, allowed peers do, and what the node or a pod asked for comes back.

use std::net::UdpSocket;

use lab::{
    helper::{Answer, ONCE, exchange, udp_once},
    lab::{Lab, POLICY},
    net::Who,
};

const DNS: u16 = 5353;

fn policy(kubelet: &str) -> String {
    POLICY.replace(
        "  tunnel:\n    dial:",
        &format!(
            "    - name: dns\n      node: {{ports: [{DNS}], protocol: UDP}}\n      allow: [{kubelet}]\n    - name: pod-dns\n      pods: {{cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [{DNS}], protocol: UDP}}\n      allow: [node: {{}}]\n  tunnel:\n    dial:"
        ),
    )
}

const PEERS: &str =
    "ipBlock: {cidr: 10.0.8.0/24, except: [10.0.8.66/32]}, ipBlock: {cidr: 'fd00:8::/32', except: ['fd00:8::66/128']}";

#[test]
fn datagrams_to_a_guarded_port_need_an_allowed_sender() {
    let mut lab = Lab::bare().unwrap();
    for who in [Who::Node, Who::Pod] {
        lab.start_in(who, "", &["echo", &format!("[::]:{DNS}")]).unwrap();
    }
    lab.write_policy(&policy(PEERS)).unwrap();
    lab.start_daemon().unwrap();
    for v6 in [false, true] {
        let [node, pod] = [Who::Node, Who::Pod].map(|who| who.at(v6, DNS));
        let from = |who: Who, to| lab.net.run(who, || udp_once(to)).unwrap();
        assert_eq!(from(Who::Peer, node), Answer::Reached, "{node}");
        for who in [Who::Stranger, Who::Excepted, Who::ControlPlane] {
            assert_eq!(from(who, node), Answer::NoAnswer, "{who:?} -> {node}");
            assert_eq!(from(who, pod), Answer::NoAnswer, "{who:?} -> {pod}");
        }
        assert_eq!(from(Who::Peer, pod), Answer::NoAnswer, "{pod}");
        // `node`: what was sent from the node's own network namespace, and from nowhere else.
        assert_eq!(lab.once(Who::Node, "", "udp", pod).unwrap(), Answer::Reached, "node -> {pod}");
        assert_eq!(lab.once(Who::Node, "", "udp", node).unwrap(), Answer::NoAnswer, "node -> {node}: no selector");
    }
    let status = lab.daemon().unwrap().status().unwrap();
    let count = |rule: &str, reason: &str| {
        status.counters.iter().find(|counter| counter.rule == rule && counter.reason == reason).unwrap().packets
    };
    assert_eq!(
        (
            count("dns", "ip-block"),
            count("dns", "no-selector"),
            count("dns", "except"),
            count("dns", "pinhole-not-allowed")
        ),
        // What the node sent to its own port is known as the node's, and the rule does not name `node`.
        (2, 4, 2, 2),
        "{:?}",
        status.counters
    );
    assert_eq!((count("pod-dns", "node"), count("pod-dns", "no-selector")), (2, 8), "{:?}", status.counters);
}

#[test]
fn a_reply_to_what_the_node_asked_is_never_touched_and_a_peers_question_makes_no_reply() {
    let mut lab = Lab::bare().unwrap();
    lab.start_in(Who::Node, "", &["echo", &format!("[::]:{}", DNS + 1)]).unwrap();
    let both = policy(PEERS).replace(&format!("ports: [{DNS}]"), &format!("ports: [{DNS}-{}]", DNS + 1));
    lab.write_policy(&both).unwrap();
    lab.start_daemon().unwrap();
    // A socket on a guarded port asks a stranger.
    let stranger = Who::Stranger.at(false, 7777);
    let answering = lab.net.run(Who::Stranger, || Ok(UdpSocket::bind(stranger)?)).unwrap();
    let answer = std::thread::spawn(move || {
        let mut buffer = [0; 16];
        let (count, from) = answering.recv_from(&mut buffer).unwrap();
        answering.send_to(&buffer[..count], from).unwrap();
        (answering, from)
    });
    let words = ["send-first", &format!("0.0.0.0:{DNS}"), &stranger.to_string()];
    assert_eq!(
        lab.ask::<Answer>(Who::Node, "", &words).unwrap(),
        Answer::Reached,
        "the answer to its own question is denied"
    );
    answer.join().unwrap();

    // A peer asks, is answered, and is withdrawn: what the server answered before makes no reply of its next question.
    let to = Who::Node.at(false, DNS + 1);
    let peer = lab.net.run(Who::Peer, || Ok(UdpSocket::bind("0.0.0.0:0")?)).unwrap();
    assert_eq!(exchange(&peer, to, ONCE).unwrap(), Answer::Reached);
    lab.write_policy(&both.replace("10.0.8.0/24, except: [10.0.8.66/32]", "10.0.9.0/24")).unwrap();
    lab.daemon().unwrap().in_force_after(1).unwrap();
    assert_eq!(exchange(&peer, to, ONCE).unwrap(), Answer::NoAnswer, "a withdrawn peer is answered");
}
