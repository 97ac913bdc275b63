//! What ends and comes back: the server, a dial under a tightened policy, the guard itself with dials open.

use std::{
    io::{Read, Write},
    time::Duration,
};

use lab::{
    certs::ServerCert,
    client::{Outcome, https, through},
    daemon::{StreamPhase, stream},
    lab::{Lab, POLICY},
    process::until,
};
use nix::sys::signal::Signal;

#[test]
fn the_tunnel_comes_back_when_the_server_does() {
    let mut lab = Lab::new(POLICY).unwrap();
    let ca = lab.certs.path("ca.crt");
    for _ in 0..3 {
        lab.server = None;
        let daemon = lab.daemon().unwrap();
        let lost = || Ok(stream(&daemon.status()?).state != StreamPhase::Connected);
        until("the loss", Duration::from_secs(5), lost).unwrap();
        lab.start_server(ServerCert::Good).unwrap();
        lab.daemon().unwrap().connected().unwrap();
        assert_eq!(https(through(lab.server().unwrap(), "10.0.0.2:10250"), "/healthz", &ca), Outcome::Http(200));
    }
}

#[test]
fn an_open_dial_is_closed_when_the_policy_no_longer_names_its_destination() {
    let mut lab = Lab::new(POLICY).unwrap();
    let mut stream = through(lab.server().unwrap(), "10.0.0.2:7001").map_err(|outcome| format!("{outcome:?}")).unwrap();
    stream.write_all(b"PUT held\n").unwrap();
    let mut kept = through(lab.server().unwrap(), "10.0.0.2:10250").map_err(|outcome| format!("{outcome:?}")).unwrap();
    lab.write_policy(&POLICY.replace("10250, 7001", "10250")).unwrap();
    let daemon = lab.daemon().unwrap();
    until("the close", Duration::from_secs(5), || Ok(daemon.printed().contains("policy-changed"))).unwrap();
    // The proxy-server closes its side; whether as an end or as an error is its business.
    assert!(!matches!(stream.read(&mut [0; 1]), Ok(1..)));
    until("one dial is left", Duration::from_secs(5), || {
        Ok(daemon.status()?.dials.is_some_and(|dials| dials.open == 1))
    })
    .unwrap();
    kept.write_all(b"\x16").unwrap();
}

#[test]
fn a_guard_that_is_told_to_end_serves_what_is_open_first() {
    let mut lab = Lab::new(POLICY).unwrap();
    let mut stream = through(lab.server().unwrap(), "10.0.0.2:7001").map_err(|outcome| format!("{outcome:?}")).unwrap();
    stream.write_all(b"GET ").unwrap();
    let daemon = lab.daemon().unwrap();
    until("the dial is open", Duration::from_secs(5), || {
        Ok(daemon.status()?.dials.is_some_and(|dials| dials.open == 1))
    })
    .unwrap();
    let process = &mut daemon.process;
    process.signal(Signal::SIGTERM).unwrap();
    std::thread::sleep(Duration::from_millis(800));
    stream.write_all(b"1000000 3\n").unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == lab::client::pattern(3, 1_000_000), "the open dial is served to its end: {} bytes", got.len());
    assert!(process.wait(Duration::from_secs(5)).unwrap().success());
    assert!(process.printed().contains("clean=true"), "{}", process.printed());
}
