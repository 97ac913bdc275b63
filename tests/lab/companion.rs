//! The upstream project's own agent in a named cgroup beside the guard: what comes through it counts as the tunnel, and it goes nowhere else.

use std::{sync::atomic::AtomicUsize, time::Duration};

use lab::{
    certs::ServerCert,
    client::{Outcome, http, https, knock, through},
    daemon::packets_of,
    helper::Answer,
    lab::{KUBELET, Lab, POLICY},
    net::Who,
    process::{Process, command, until, upstream},
    servers::proxy_server::AGENT_PORT,
};
use nodeguard::report::status::Status;

const STRANGERS: usize = 1000;

/// Starts it as its manifest does, in a cgroup below the guarded one. It alone is registered for this node.
fn agent(lab: &Lab, cgroup: &str) -> Process {
    let mut agent =
        command(&upstream("proxy-agent").unwrap(), lab.net.open(Who::Node).unwrap(), &lab.guarded.join(cgroup))
            .unwrap();
    agent.arg(format!("--proxy-server-host={}", Who::ControlPlane.v4()));
    agent.arg(format!("--proxy-server-port={AGENT_PORT}"));
    agent.args(["--agent-identifiers=ipv4=10.0.0.2&ipv4=10.244.1.2&ipv4=10.0.0.3&ipv6=fd00::2", "--v=1"]);
    agent.args(["--health-server-host=127.0.0.1", "--health-server-port=18103", "--admin-server-port=18203"]);
    agent.args(["--sync-interval=100ms", "--probe-interval=100ms"]);
    agent.args(lab.certs.of_agent());
    Process::start("proxy-agent", agent, &lab.directory.join("proxy-agent.log")).unwrap()
}

fn packets(status: &Status, rule: &str, reason: &str) -> u64 {
    packets_of(status, Some(rule), reason)
}

#[test]
fn the_upstream_agent_as_a_companion() {
    let companion =
        format!("    companion: {{cgroup: /agent, servers: [{{cidr: 10.0.0.1/32, ports: [{AGENT_PORT}]}}]}}\n");
    let mut lab = Lab::bare().unwrap();
    lab.make_cgroup("agent").unwrap();
    lab.write_policy(&format!("{POLICY}{companion}")).unwrap();
    lab.start_server(ServerCert::Good).unwrap();
    // The guard's own tunnel stays out of it: it asks for a server where there is none.
    lab.setup.agent_port = Some(AGENT_PORT + 1);
    lab.start_daemon().unwrap();
    let mut running = agent(&lab, "agent");
    let ca = lab.certs.path("ca.crt");
    let server = lab.server().unwrap();
    until("the upstream agent is registered", Duration::from_secs(20), || {
        running.check()?;
        Ok(https(through(server, "10.0.0.2:10250"), "/healthz", &ca) == Outcome::Http(200))
    })
    .unwrap();

    let daemon = lab.daemon.as_ref().unwrap();
    let made = AtomicUsize::new(0);
    let stranger = lab.net.open(Who::Stranger).unwrap();
    let kubelet = Who::Node.at(false, KUBELET);
    let before = daemon.status().unwrap();
    let dialled = std::thread::scope(|scope| {
        let knocking = scope.spawn(|| knock(stranger, kubelet, STRANGERS, &made).unwrap());
        let mut dialled = 0;
        while !knocking.is_finished() || dialled < 20 {
            assert_eq!(https(through(server, "10.0.0.2:10250"), "/healthz", &ca), Outcome::Http(200), "kubelet");
            assert_eq!(http(through(server, "10.244.1.2:8080"), "/"), Outcome::Http(200), "the guarded pod port");
            dialled += 1;
        }
        assert_eq!(knocking.join().unwrap(), 0, "a stranger was admitted meanwhile");
        dialled
    });
    let after = daemon.status().unwrap();
    for rule in ["kubelet", "web"] {
        let counted = packets(&after, rule, "tunnel") - packets(&before, rule, "tunnel");
        assert!(counted >= dialled, "{rule}: {counted} packets of {dialled} dials counted as tunnel");
    }
    assert_eq!(after.dials.map(|dials| dials.open), Some(0), "none came by the guard's own tunnel");
    let denied = packets(&after, "kubelet", "no-selector") - packets(&before, "kubelet", "no-selector");
    assert!(denied >= STRANGERS as u64, "{denied} denied");

    // What the server asks of it beyond its destinations fails at connect: a pod's open port, a neighbour, the control plane.
    for to in ["10.244.1.2:8081", "10.0.0.3:80", "10.0.0.2:22", "127.0.0.1:10250"] {
        let before = packets(&daemon.status().unwrap(), "-", "companion-destination");
        let refused = through(server, to).map(drop);
        assert!(refused.is_err(), "{to}: dialled");
        let counted = packets(&daemon.status().unwrap(), "-", "companion-destination") - before;
        assert!(counted >= 1, "{to}: not by the guard: {refused:?}\n{}", running.printed());
    }
    for (to, answer) in [
        ("10.0.0.1:2379", Answer::NotPermitted),
        ("10.0.0.3:80", Answer::NotPermitted),
        ("10.0.0.2:10250", Answer::Reached),
    ] {
        assert_eq!(lab.once(Who::Node, "agent", "tcp", to.parse().unwrap()).unwrap(), answer, "{to}");
    }
    assert_eq!(lab.once(Who::Node, "", "tcp", kubelet).unwrap(), Answer::NoAnswer, "the rest of the node is no tunnel");
    println!(
        "companion: {dialled} dials to kubelet and to a pod each through the upstream agent; {STRANGERS} stranger attempts, 0 admitted"
    );
}
