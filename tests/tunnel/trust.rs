//! What is asked of the proxy-server beyond its CA: a key, a name, a TLS version, that it is not revoked; and how old a stream may become.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guard_policy::pin::Pin;
use lab::{
    bare::{Agent, Place, connected},
    certs::{NAME, ServerCert, Tls},
    daemon::stream,
    load::Steady,
    servers::{Listener, eventually, proxy_server::Spec},
};
use rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::{at, in_place, serve_endpoint};

/// An agent of the one server.
fn agent(place: &Place, more: &[&str]) -> Result<Agent> {
    Agent::start(place, "10.0.0.1:8191", more)
}

/// Waits for an attempt that fails with this text.
async fn refused(agent: &mut Agent, why: &str) -> Result<()> {
    let (what, mut last) = (format!("a refusal with `{why}`"), None);
    let refused = eventually(&what, Duration::from_secs(10), async || {
        agent.process.check()?;
        last = agent.status().await.ok().map(|status| stream(&status).last_error.unwrap_or_default());
        Ok(last.as_ref().is_some_and(|error| error.contains(why)))
    });
    refused.await.with_context(|| format!("the last error is {last:?}")).map(drop)
}

#[test]
fn a_server_of_the_right_ca_is_refused_without_the_right_key_or_name() {
    in_place(&[], async |place| {
        let server = Spec::new("a", 0, 1).start(place)?;
        let certificate = CertificateDer::from_pem_file(place.certs.path("server.crt"))?;
        let parsed = rustls::server::ParsedCertificate::try_from(&certificate)?;
        let pin = Pin::of(&parsed.subject_public_key_info());
        let other = "sha256/AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        for (flag, why) in [
            (&*format!("--server-spki-pin={other}"), "none of --server-spki-pin"),
            ("--server-san=URI:spiffe://cluster.local/other", "none of --server-san"),
        ] {
            refused(&mut agent(place, &[flag])?, why).await?;
        }
        // With one of several right, TLS 1.3 alone, and the tunnel up.
        let pins = format!("--server-spki-pin={other},{pin}");
        let names = format!("--server-san=other.example,DNS:{NAME}");
        let mut right = agent(place, &[&pins, &names, "--tls-min-version=1.3"])?;
        right.connected(&["a"]).await?;
        let tls = stream(&right.status().await?).tls;
        ensure!(tls.as_ref().is_some_and(|tls| tls.contains("TLSv1_3")), "{tls:?}");
        drop((right, server));
        // A server that only speaks TLS 1.2.
        let old = Tls { protocol: None, versions: vec![&rustls::version::TLS12], ..Tls::server(&place.certs) };
        let acceptor = old.acceptor()?;
        let _old = Listener::start(at(8191), move |tcp| {
            let accepting = acceptor.accept(tcp);
            async { accepting.await.map(drop).map_err(Into::into) }
        })
        .await?;
        refused(&mut agent(place, &["--tls-min-version=VersionTLS13"])?, "ProtocolVersion").await
    });
}

#[test]
fn a_revoked_server_gets_no_new_stream_and_a_list_is_taken_when_it_changes() {
    in_place(&[], async |place| {
        let server = Spec::new("a", 0, 1).start(place)?;
        let file = place.directory.join("crl.pem");
        std::fs::write(&file, place.certs.revocations(None, 4000)?)?;
        let mut agent = agent(place, &[&format!("--crl-file={}", file.display())])?;
        agent.connected(&["a"]).await?;
        // Revoked: the old stream serves on, as with any material that brings no new stream; the next one is refused.
        std::fs::write(&file, place.certs.revocations(Some("server"), 4000)?)?;
        agent.prints("is revoked").await?;
        let weakened = agent.status().await?.weakened;
        ensure!(weakened.iter().any(|weakness| weakness.message.contains("is revoked")), "{weakened:?}");
        drop(server);
        refused(&mut agent, "").await?;
        // A list that is over tells nothing.
        place.certs.server(ServerCert::Good)?;
        let server = Spec::new("a", 0, 1).start(place)?;
        agent.connected(&["a"]).await.context("a server with another certificate")?;
        std::fs::write(&file, place.certs.revocations(None, 2020)?)?;
        agent.prints("has expired").await?;
        drop(server);
        let _server = Spec::new("a", 0, 1).start(place)?;
        refused(&mut agent, "has expired").await?;
        std::fs::write(&file, place.certs.revocations(None, 4000)?)?;
        agent.connected(&["a"]).await.map(drop)
    });
}

#[test]
fn a_stream_is_replaced_when_it_is_old_and_nothing_is_cut() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let server = Spec::new("a", 0, 1).start(place)?;
        let mut agent = agent(place, &["--max-stream-age=1s"])?;
        agent.connected(&["a"]).await?;
        let steady = Steady::start(&server.load(), 4, 1).await?;
        tokio::time::sleep(Duration::from_secs(4)).await;
        let streams = agent.streams().await?;
        let asked = steady.end().await?;
        let replaced = agent.process.printed().matches("replaces=true").count();
        ensure!((3..=6).contains(&replaced), "{replaced} replaced in 4 s");
        ensure!(connected(&streams).len() == 1, "{streams:?}");
        println!("trust: {replaced} streams replaced for their age, {asked} requests, none failed");
        Ok(())
    });
}
