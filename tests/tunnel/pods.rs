//! The pods of the node are advertised, and again when they change, while what is open goes on.

use std::{
    io::{Read, Write},
    process::Command,
    time::Duration,
};

use lab::{
    certs::ServerCert,
    client::{Outcome, http, through},
    daemon::binary,
    lab::{Lab, POLICY},
    net::{Who, ip},
    process::{Process, output, until},
};
use nodeguard::report::status::Status;

#[test]
fn pods_are_advertised_and_a_new_one_cuts_nothing() {
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(POLICY).unwrap();
    lab.start_server(ServerCert::Good).unwrap();
    let mut command = lab.daemon_command().unwrap();
    command.arg("--advertise-pod-addresses");
    let log = lab.directory.join("nodeguard.log");
    let socket = lab.directory.join("admin.sock");
    let mut daemon = Process::start("nodeguard", command, &log).unwrap();
    let status = || -> anyhow::Result<Status> {
        let mut status = Command::new(binary()?);
        status.args(["status", "-o", "json", "--admin-socket"]).arg(&socket);
        Ok(serde_json::from_slice(&output(&mut status)?.out)?)
    };
    let identifiers =
        || -> anyhow::Result<String> { Ok(status()?.tunnel.map(|tunnel| tunnel.identifiers).unwrap_or_default()) };
    until("the pod is advertised", Duration::from_secs(20), || {
        daemon.check()?;
        let all = identifiers().unwrap_or_default();
        Ok(["ipv4=10.244.1.2", "ipv6=fd01:244:1::2", "ipv4=10.0.0.2"]
            .iter()
            .all(|one| all.split('&').any(|have| have == *one)))
    })
    .unwrap();
    // The bridge's own address is the node's, and the world outside the policy's prefixes is nobody's.
    assert!(!identifiers().unwrap().contains("127.0.0.1"));
    let server = lab.server().unwrap();
    until("a dial to the pod", Duration::from_secs(10), || {
        Ok(http(through(server, "10.244.1.2:8080"), "/") == Outcome::Http(200))
    })
    .unwrap();

    let mut held = through(server, "10.0.0.2:7001").map_err(|outcome| format!("{outcome:?}")).unwrap();
    let pod = lab.net.namespace(Who::Pod);
    ip(&["-n", &pod, "address", "add", "10.244.1.9/24", "dev", "eth0"], "").unwrap();
    until("the new one is advertised", Duration::from_secs(30), || {
        Ok(identifiers()?.split('&').any(|one| one == "ipv4=10.244.1.9"))
    })
    .unwrap();
    until("a dial to the new one", Duration::from_secs(10), || {
        Ok(http(through(server, "10.244.1.9:8080"), "/") == Outcome::Http(200))
    })
    .unwrap();
    held.write_all(b"GET 1000 3\n").unwrap();
    let mut got = Vec::new();
    held.read_to_end(&mut got).unwrap();
    assert!(got == lab::client::pattern(3, 1000), "what was open before is served after: {} bytes", got.len());
}
