//! Certificates, CA and token rotate under load: no connection is cut, and each new handshake uses what is new.

use std::{collections::VecDeque, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    bare::{Agent, Place, connected},
    certs::ServerCert,
    kube::KubeApi,
    load::Steady,
    servers::{
        eventually,
        fake::{Connection, Dials, Fake, Manners},
        proxy_server::Spec,
    },
};
use nix::sys::signal::Signal;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::{ENDPOINT, at, in_place, serve_endpoint, soak};

/// Where the agents of these tests look for their server.
const SERVERS: &str = "10.0.0.1:8191";

fn rounds() -> u64 {
    if soak() { 50 } else { 6 }
}

/// Waits until the one stream that takes dials was made with the credentials of this number.
async fn replaced(agent: &mut Agent, number: u64) -> Result<Duration> {
    agent
        .until(&format!("a stream made with number {number}"), Duration::from_secs(10), |all| {
            connected(all).iter().map(|stream| stream.made_with).eq([Some(number)])
        })
        .await
}

/// Waits until nothing of earlier streams is left.
async fn alone(agent: &mut Agent) -> Result<()> {
    agent.until("the old streams are gone", Duration::from_secs(10), |all| all.len() == 1).await.map(drop)
}

/// As kubelet does it for a Secret: a new directory, and one link that is renamed.
fn swap(directory: &Path, round: u64, files: &[(&str, &Path)]) -> Result<()> {
    let new = directory.join(format!("..{round}"));
    std::fs::create_dir_all(&new)?;
    for (name, from) in files {
        std::fs::copy(from, new.join(name))?;
    }
    let (link, data) = (directory.join("..tmp"), directory.join("..data"));
    std::os::unix::fs::symlink(format!("..{round}"), &link)?;
    std::fs::rename(&link, &data)?;
    for (name, _) in files {
        if directory.join(name).symlink_metadata().is_err() {
            std::os::unix::fs::symlink(Path::new("..data").join(name), directory.join(name))?;
        }
    }
    if round > 0 {
        std::fs::remove_dir_all(directory.join(format!("..{}", round - 1)))?;
    }
    Ok(())
}

#[test]
fn a_client_certificate_rotates_under_load_and_nothing_is_cut() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let spec = Spec::new("a", 0, 1);
        let server = spec.start(place)?;
        let secret = place.directory.join("secret");
        let swapped = |place: &Place, round: u64| {
            let (certificate, key) = (place.certs.path("agent.crt"), place.certs.path("agent.key"));
            swap(&secret, round, &[("tls.crt", &certificate), ("tls.key", &key)])
        };
        swapped(place, 0)?;
        let certificate = format!("--agent-cert={}", secret.join("tls.crt").display());
        let key = format!("--agent-key={}", secret.join("tls.key").display());
        let mut agent = Agent::start_bare(place, SERVERS, &[&certificate, &key], &[])?;
        agent.connected(&["a"]).await?;
        let steady = Steady::start(&server.load(), 8, 2).await?;
        let mut slowest = Duration::ZERO;
        for round in 1..=rounds() {
            place.certs.agent()?;
            swapped(place, round)?;
            slowest = slowest.max(replaced(&mut agent, round + 1).await?);
        }
        // SIGHUP reads everything anew, which changes nothing here.
        agent.process.signal(Signal::SIGHUP)?;
        agent.prints("SIGHUP: files are read again").await?;
        replaced(&mut agent, rounds() + 1).await?;
        // Half a rotation is none: told, weakened, and the old pair stays in use.
        place.certs.agent()?;
        std::fs::copy(place.certs.path("agent.crt"), secret.join("..data/tls.crt"))?;
        eventually("the broken pair is reported", Duration::from_secs(10), async || {
            Ok(agent
                .status()
                .await?
                .weakened
                .iter()
                .any(|weakness| weakness.message.contains("--agent-cert and --agent-key")))
        })
        .await?;
        std::fs::copy(place.certs.path("agent.key"), secret.join("..data/tls.key"))?;
        replaced(&mut agent, rounds() + 2).await?;
        let asked = steady.end().await?;
        alone(&mut agent).await?;
        ensure!(
            !agent.status().await?.weakened.iter().any(|weakness| weakness.message.contains("--agent-cert")),
            "mended"
        );

        // To certificates of another CA, while this server still asks for the old one: what serves goes on.
        let steady = Steady::start(&server.load(), 2, 0).await?;
        let other = place.certs.new_authority()?;
        std::fs::write(place.certs.path("other-ca.crt"), other)?;
        place.certs.agent()?;
        swapped(place, rounds() + 1)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let in_use = connected(&agent.streams().await?).iter().any(|stream| stream.made_with == Some(rounds() + 2));
        ensure!(in_use, "the old certificate no longer serves");
        steady.end().await?;
        // The server asks for the new CA from its restart on: only the new certificate brings the tunnel back.
        drop(server);
        let server = Spec { client_ca: "other-ca.crt", ..spec }.start(place)?;
        replaced(&mut agent, rounds() + 3).await?;
        drop(server.load().connect().await?);
        println!(
            "rotation: {} client certificates under load, {asked} requests, none failed; a new stream within {slowest:.1?}",
            rounds() + 1
        );
        Ok(())
    });
}

#[test]
fn a_token_rotates_under_load_and_the_server_gets_each_new_one() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let api = KubeApi::start(at(6443), &place.certs).await?;
        let kubeconfig = api.kubeconfig(&place.certs, &place.directory)?;
        let more = ["--kube-api-content-type=application/json"];
        let server = Spec { kubeconfig: Some(kubeconfig), more: &more, ..Spec::new("a", 0, 1) }.start(place)?;
        let file = place.directory.join("token");
        let write = |round: u64| {
            api.accept(&format!("token-{round}"));
            // With the newline that files have.
            std::fs::write(&file, format!("token-{round}\n"))
        };
        write(0)?;
        let token = format!("--service-account-token-path={}", file.display());
        let mut agent = Agent::start_bare(place, SERVERS, &[&token], &[])?;
        agent.connected(&["a"]).await?;
        let steady = Steady::start(&server.load(), 8, 2).await?;
        for round in 1..=rounds() {
            write(round)?;
            replaced(&mut agent, round + 1).await?;
            ensure!(api.reviewed().contains(&(format!("token-{round}"), true)), "{:?}", api.reviewed());
        }
        let asked = steady.end().await?;
        alone(&mut agent).await?;
        println!(
            "rotation: {} tokens under load, the server asked about each; {asked} requests, none failed",
            rounds()
        );
        Ok(())
    });
}

/// A stream of a fake server, and a connection that is held on it.
struct Held(Dials, Connection);

impl Held {
    /// The next stream; it has to show the certificate that is on disk now.
    async fn next(fake: &mut Fake, place: &Place) -> Result<Held> {
        let stream = fake.agent().await?;
        let on_disk = CertificateDer::from_pem_file(place.certs.path("agent.crt"))?;
        ensure!(stream.certificate == Some(on_disk), "an old certificate was shown");
        let dials = Dials::new(stream);
        let connection = dials.dial(ENDPOINT).await?;
        Ok(Held(dials, connection))
    }

    /// It answers, and once it is closed its stream ends.
    async fn end(mut self) -> Result<()> {
        self.1.fetch(1024).await?;
        ensure!(!self.0.ended.is_cancelled(), "a stream with a connection was cut");
        self.1.close().await?;
        self.0.ends().await
    }
}

#[test]
fn a_ca_rotates_and_each_handshake_shows_what_is_new() {
    /// How many streams are held at once: their number is bounded.
    const MOST: usize = 40;
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let mut fake = Fake::start(place, 8191, Manners::default()).await?;
        let mut agent = Agent::start(place, SERVERS, &[])?;
        let (mut number, mut ended) = (1, 0);
        let mut held = VecDeque::from([Held::next(&mut fake, place).await?]);
        for _ in 0..rounds() {
            // The new CA beside the old one; then certificates of the new one; then the new one alone.
            let (before, after) = (std::fs::read_to_string(place.certs.path("ca.crt"))?, place.certs.new_authority()?);
            for step in 0..3 {
                if step == 0 {
                    std::fs::write(place.certs.path("ca.crt"), format!("{before}{after}"))?;
                    fake.renew(&place.certs)?;
                } else if step == 1 {
                    place.certs.server(ServerCert::Good)?;
                    fake.renew(&place.certs)?;
                    place.certs.agent()?;
                } else {
                    std::fs::write(place.certs.path("ca.crt"), &after)?;
                    fake.renew(&place.certs)?;
                }
                number += 1;
                held.push_back(Held::next(&mut fake, place).await.with_context(|| format!("step {step}"))?);
                replaced(&mut agent, number).await?;
                if held.len() > MOST {
                    held.pop_front().context("held")?.end().await?;
                    ended += 1;
                }
            }
        }
        // The last stream is the one in use.
        let last = held.pop_back().context("held")?;
        ended += held.len() + 1;
        for Held(_, connection) in &mut held {
            connection.fetch(1024).await?;
        }
        for each in held {
            each.end().await?;
        }
        let Held(_dials, mut connection) = last;
        connection.fetch(1024).await?;
        println!("rotation: {} CAs, {ended} streams with an open connection each, none cut", rounds());
        Ok(())
    });
}
