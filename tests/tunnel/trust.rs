//! What is asked of the proxy-server beyond its CA: a key, a name, a TLS version, that it is not revoked; and how old a stream may become.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use guard_policy::pin::Pin;
use lab::{
    bare::{Place, SERVER},
    certs::{NAME, ServerCert},
    fleet::{Agent, Spec},
};
use rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::in_place;

fn flags(place: &Place, more: &[String]) -> Vec<String> {
    let mut flags = Agent::with_certificate(place);
    flags.extend([format!("--proxy-server-host={SERVER}"), "--proxy-server-port=8191".to_owned()]);
    flags.extend_from_slice(more);
    flags
}

/// Waits for an attempt that fails like this.
async fn refused(agent: &mut Agent, why: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        agent.process.check()?;
        let said = agent.status().await.map(|status| status.tunnel["streams"][0]["lastError"].to_string());
        if said.as_ref().is_ok_and(|error| error.contains(why)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no refusal with `{why}`: {said:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_server_of_the_right_ca_is_refused_without_the_right_key_or_name() {
    in_place(&[], async |place| {
        let server = Spec::new("a", 0, 1).start(place)?;
        let certificate = CertificateDer::from_pem_file(place.certs.path("server.crt"))?;
        let parsed = rustls::server::ParsedCertificate::try_from(&certificate)?;
        let pin = Pin::of(&parsed.subject_public_key_info());
        let other = "sha256/AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        let bad: [(Vec<String>, &str); 2] = [
            (vec![format!("--server-spki-pin={other}")], "none of --server-spki-pin"),
            (vec!["--server-san=URI:spiffe://cluster.local/other".to_owned()], "none of --server-san"),
        ];
        for (more, why) in bad {
            refused(&mut Agent::start(place, &flags(place, &more))?, why).await?;
        }
        // With one of several right, TLS 1.3 alone, and the tunnel up.
        let more = [
            format!("--server-spki-pin={other},{pin}"),
            format!("--server-san=other.example,DNS:{NAME}"),
            "--tls-min-version=1.3".to_owned(),
        ];
        let mut agent = Agent::start(place, &flags(place, &more))?;
        agent.connected(&["a"]).await?;
        ensure!(agent.status().await?.tunnel["streams"][0]["tls"].to_string().contains("TLSv1_3"));
        drop((agent, server));
        // A server that only speaks TLS 1.2.
        let more = ["--tls-min-version=VersionTLS13".to_owned()];
        let old = std::sync::Arc::new(only_tls12(place)?);
        let listener = tokio::net::TcpListener::bind((SERVER, 8191)).await?;
        tokio::spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(old);
            while let Ok((tcp, _)) = listener.accept().await {
                let _ = acceptor.accept(tcp).await;
            }
        });
        refused(&mut Agent::start(place, &flags(place, &more))?, "ProtocolVersion").await
    });
}

fn only_tls12(place: &Place) -> Result<rustls::ServerConfig> {
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])?
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(place.certs.path("server.crt"))?],
            rustls::pki_types::PrivateKeyDer::from_pem_file(place.certs.path("server.key"))?,
        )?)
}

#[test]
fn a_revoked_server_gets_no_new_stream_and_a_list_is_taken_when_it_changes() {
    in_place(&[], async |place| {
        let server = Spec::new("a", 0, 1).start(place)?;
        let file: PathBuf = place.directory.join("crl.pem");
        std::fs::write(&file, place.certs.revocations(None, 4000)?)?;
        let mut agent = Agent::start(place, &flags(place, &[format!("--crl-file={}", file.display())]))?;
        agent.connected(&["a"]).await?;
        // Revoked: the old stream serves on, as with any material that brings no new stream; the next one is refused.
        std::fs::write(&file, place.certs.revocations(Some("server"), 4000)?)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !agent.process.printed().contains("is revoked") {
            ensure!(Instant::now() < deadline, "{}", agent.process.printed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let weakened = agent.status().await?.weakened;
        ensure!(weakened.iter().any(|line| line.contains("is revoked")), "{weakened:?}");
        drop(server);
        refused(&mut agent, "").await?;
        // A list that is over tells nothing.
        place.certs.server(ServerCert::Good)?;
        let server = Spec::new("a", 0, 1).start(place)?;
        agent.connected(&["a"]).await.context("a server with another certificate")?;
        std::fs::write(&file, place.certs.revocations(None, 2020)?)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !agent.process.printed().contains("is over") {
            ensure!(Instant::now() < deadline, "{}", agent.process.printed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(server);
        let _server = Spec::new("a", 0, 1).start(place)?;
        refused(&mut agent, "is over").await?;
        std::fs::write(&file, place.certs.revocations(None, 4000)?)?;
        agent.connected(&["a"]).await.map(drop)
    });
}

#[test]
fn a_stream_is_replaced_when_it_is_old_and_nothing_is_cut() {
    in_place(&[], async |place| {
        tokio::spawn(lab::endpoint::serve(tokio::net::TcpListener::bind("0.0.0.0:7000").await?));
        let server = Spec::new("a", 0, 1).start(place)?;
        let mut agent = Agent::start(place, &flags(place, &["--max-stream-age=1s".to_owned()]))?;
        agent.connected(&["a"]).await?;
        let steady = lab::fleet::Steady::start(&server.load(), 4, 1).await?;
        tokio::time::sleep(Duration::from_secs(4)).await;
        let streams = agent.streams().await?;
        let asked = steady.end().await?;
        let replaced = agent.process.printed().matches("replaces=true").count();
        ensure!((3..=6).contains(&replaced), "{replaced} replaced in 4 s");
        ensure!(streams.iter().filter(|(_, state, _)| state == "connected").count() == 1, "{streams:?}");
        println!("trust: {replaced} streams replaced for their age, {asked} requests, none failed");
        Ok(())
    });
}
