//! The tunnel through an HTTP proxy beside the kernel half: pinholes open as ever, and the hub rule holds the guard to the proxy.

use lab::{
    certs::ServerCert,
    client::Outcome,
    daemon::{StreamPhase, stream},
    helper::Answer,
    lab::{Lab, POLICY},
    net::Who,
    process::until,
    servers::proxy_server::AGENT_PORT,
};

const PROXY: &str = "10.0.0.1:3128";

#[test]
fn pinholes_and_the_hub_rule_hold_through_an_http_proxy() {
    // Neither the proxy-server's port nor any other is reached from the node: the HTTP proxy's alone.
    let hub = "  controlPlane: {addresses: [10.0.0.1/32, 'fd00::1/128'], ports: [6443, 3128]}\n";
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(&format!("{POLICY}{hub}")).unwrap();
    lab.start_server(ServerCert::Good).unwrap();
    lab.start_in(Who::ControlPlane, "../elsewhere", &["http-proxy", PROXY]).unwrap();
    lab.setup.variables = vec![("HTTPS_PROXY", "http://10.0.0.1:3128"), ("NO_PROXY", "10.244.0.0/16,.cluster.local")];
    lab.start_daemon().unwrap().connected().unwrap();
    let status = lab.daemon().unwrap().status().unwrap();
    assert_eq!(stream(&status).server, format!("10.0.0.1:{AGENT_PORT} through {PROXY}"));
    let direct = Who::ControlPlane.at(false, AGENT_PORT);
    assert_eq!(lab.once(Who::Node, "", "tcp", direct).unwrap(), Answer::NotPermitted);
    let kubelet = |lab: &Lab| lab.healthz_dialled("10.0.0.2:10250").unwrap();
    assert_eq!(kubelet(&lab), Outcome::Http(200), "a guarded port, through a pinhole");
    let stranger = Who::Node.at(false, 10_250);
    assert_eq!(lab.once(Who::Stranger, "", "tcp", stranger).unwrap(), Answer::NoAnswer);
    // Without the variable the hub rule keeps the guard from the server, and it says so.
    lab.daemon.take().unwrap().kill().unwrap();
    lab.setup.variables = vec![("HTTPS_PROXY", "http://10.0.0.1:3128"), ("NO_PROXY", "10.0.0.1")];
    let daemon = lab.start_daemon().unwrap();
    until("it is told", std::time::Duration::from_secs(10), || {
        let status = daemon.status()?;
        assert_ne!(stream(&status).state, StreamPhase::Connected);
        Ok(stream(&status).last_error.unwrap_or_default().contains("Operation not permitted"))
    })
    .unwrap();
    lab.daemon.take().unwrap().kill().unwrap();
    lab.setup.variables = vec![("HTTPS_PROXY", "http://10.0.0.1:3128")];
    lab.start_daemon().unwrap().connected().unwrap();
    assert_eq!(kubelet(&lab), Outcome::Http(200));
}
