//! Where processes of the node may go: the control plane's ports, and what a companion may reach.

use std::{net::SocketAddr, sync::atomic::AtomicUsize, time::Duration};

use lab::{
    client::knock,
    helper::Answer,
    lab::{KUBELET, Lab, POLICY},
    net::Who,
    process::until,
    servers::proxy_server::AGENT_PORT,
};
use nodeguard::kernel::observe::packets::PacketCounter;

/// Nothing listens there: what is let out is refused by the control plane's own host.
const OTHER: u16 = 2379;

fn control_plane(v6: bool, port: u16) -> SocketAddr {
    Who::ControlPlane.at(v6, port)
}

#[test]
fn the_control_plane_is_reached_on_its_named_ports_alone() {
    let hub = format!("  controlPlane: {{addresses: [10.0.0.1/32, 'fd00::1/128'], ports: [6443, {AGENT_PORT}]}}\n");
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(&format!("{POLICY}{hub}")).unwrap();
    lab.start_daemon().unwrap();
    for v6 in [false, true] {
        for who in [Who::Node, Who::Pod] {
            let attempt = |how: &str, to| lab.once(who, "", how, to).unwrap();
            assert_eq!(attempt("tcp", control_plane(v6, 6443)), Answer::Refused, "{who:?}: let out");
            assert_eq!(attempt("tcp", control_plane(v6, OTHER)), Answer::NotPermitted, "{who:?}");
            assert_eq!(attempt("udp", control_plane(v6, 6443)), Answer::NotPermitted, "{who:?}: the ports are TCP's");
            let elsewhere = Who::Stranger.at(v6, OTHER);
            assert_eq!(attempt("tcp", elsewhere), Answer::Refused, "{who:?}: not the control plane");
        }
    }
    let daemon = lab.daemon().unwrap();
    let denied = |audited: bool| {
        let counters = daemon.status().unwrap().counters;
        let of = |counter: &&PacketCounter| counter.reason == "control-plane-port" && counter.audited == audited;
        counters.iter().filter(of).map(|counter| counter.packets).sum::<u64>()
    };
    assert_eq!(denied(false), 8);
    let told = || daemon.printed().matches("control-plane-port").count();
    until("each is told", Duration::from_secs(5), || Ok(told() > 0)).unwrap();
    std::fs::write(lab.policy(), format!("{POLICY}{hub}").replace("mode: Enforce", "mode: Audit")).unwrap();
    let daemon = lab.daemon().unwrap();
    daemon.in_force_after(1).unwrap();
    assert_eq!(
        lab.once(Who::Pod, "", "tcp", control_plane(false, OTHER)).unwrap(),
        Answer::Refused,
        "audit lets it out"
    );
}

#[test]
fn a_companion_counts_as_the_tunnel_and_reaches_nothing_else() {
    let companion = "    companion: {cgroup: /agent, servers: [{cidr: 10.0.0.1/32, ports: [8132]}]}\n";
    let mut lab = Lab::bare().unwrap();
    lab.make_cgroup("agent").unwrap();
    lab.write_policy(&format!("{POLICY}{companion}")).unwrap();
    lab.start_daemon().unwrap();
    let attempt = |cgroup: &str, to: SocketAddr| lab.once(Who::Node, cgroup, "tcp", to).unwrap();
    let made = AtomicUsize::new(0);
    let stranger = lab.net.open(Who::Stranger).unwrap();
    let node = Who::Node.at(false, KUBELET);
    std::thread::scope(|scope| {
        let knocking = scope.spawn(|| knock(stranger, node, 1000, &made).unwrap());
        for v6 in [false, true] {
            let [kubelet, open] = [KUBELET, 7001].map(|port| Who::Node.at(v6, port));
            let [guarded, unnamed] = [8080, 8081].map(|port| Who::Pod.at(v6, port));
            for to in [kubelet, open, guarded] {
                assert_eq!(attempt("agent", to), Answer::Reached, "{to} is a destination of tunnel.dial");
            }
            // The same port is closed to the rest of the node: there is no `node` in its rule.
            assert_eq!(attempt("", kubelet), Answer::NoAnswer);
            let stranger = Who::Stranger.at(v6, 80);
            for to in [unnamed, stranger, control_plane(v6, OTHER)] {
                assert_eq!(attempt("agent", to), Answer::NotPermitted, "{to}");
                assert_ne!(attempt("", to), Answer::NotPermitted, "{to}: others may");
            }
        }
        assert_eq!(attempt("agent", control_plane(false, 8132)), Answer::Refused, "its server: let out");
        assert_eq!(attempt("agent", "127.0.0.1:10250".parse().unwrap()), Answer::NotPermitted, "loopback is not named");
        assert_eq!(attempt("agent", "0.0.0.0:10250".parse().unwrap()), Answer::NotPermitted, "that is loopback too");
        let udp = lab.once(Who::Node, "agent", "udp", control_plane(false, 8132)).unwrap();
        assert_eq!(udp, Answer::NotPermitted, "the server's port is TCP's");
        assert_eq!(knocking.join().unwrap(), 0, "a stranger was admitted meanwhile");
    });

    // An edit that withdraws a destination cuts what the companion has open there.
    let log = lab.start_in(Who::Node, "agent", &["hold", "10.0.0.2:7001"]).unwrap();
    let kubelet_log = lab.start_in(Who::Node, "agent", &["hold", "10.0.0.2:10250"]).unwrap();
    let ended = |log: &std::path::Path| std::fs::read_to_string(log).unwrap().contains("ended");
    lab.write_policy(&format!("{}{companion}", POLICY.replace("[10250, 7001]", "[10250]"))).unwrap();
    until("the withdrawn destination is cut", Duration::from_secs(1), || Ok(ended(&log))).unwrap();
    assert!(!ended(&kubelet_log), "the other one goes on");
    let status = lab.daemon().unwrap().status().unwrap();
    let denied =
        status.counters.iter().find(|counter| counter.reason == "companion-destination" && counter.packets > 0);
    assert!(denied.is_some(), "{:?}", status.counters);
}
