//! A proxy-server that cannot prove who it is gets no tunnel, and the message says which check failed.

use std::time::Duration;

use lab::{
    certs::ServerCert,
    client::{Outcome, https, through},
    daemon::{StreamPhase, stream},
    lab::{Lab, POLICY},
    process::until,
};

#[test]
fn a_server_with_a_wrong_certificate_gets_no_tunnel() {
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(POLICY).unwrap();
    let cases = [
        (ServerCert::OtherCa, "check: issuer", "does not come from a CA in"),
        (ServerCert::Expired, "check: validity", "has expired"),
        (ServerCert::WrongName, "check: name", "is not for `10.0.0.1`"),
    ];
    lab.start_server(cases[0].0).unwrap();
    lab.start_daemon().unwrap();
    for (cert, check, words) in cases {
        lab.start_server(cert).unwrap();
        let daemon = lab.daemon().unwrap();
        let mut error = String::new();
        until(check, Duration::from_secs(10), || {
            let stream = stream(&daemon.status()?);
            assert_ne!(stream.state, StreamPhase::Connected, "{cert:?}");
            error = stream.last_error.unwrap_or_default();
            Ok(error.contains(check))
        })
        .unwrap_or_else(|reason| panic!("{reason}: the last error was `{error}`"));
        assert!(error.contains(words), "{error}");
        assert!(daemon.printed().contains("no tunnel"), "an ERROR says so");
        let outcome = through(lab.server().unwrap(), "10.0.0.2:10250").err();
        assert!(matches!(outcome, Some(Outcome::NotConnected(500..=599, _))), "{outcome:?}");
        println!("certificates: {cert:?}: no tunnel, \"{error}\"");
    }
    // With the right one, the same guard comes up by itself.
    lab.start_server(ServerCert::Good).unwrap();
    lab.daemon().unwrap().connected().unwrap();
    let ca = lab.certs.path("ca.crt");
    assert_eq!(https(through(lab.server().unwrap(), "10.0.0.2:10250"), "/healthz", &ca), Outcome::Http(200));
}
