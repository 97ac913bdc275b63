//! Certificates, CA and token rotate under load: no connection is cut, and each new handshake uses what is new.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lab::{
    bare::{Place, SERVER, Who},
    certs::ServerCert,
    endpoint,
    fake::{Connection, Dials, Fake, Manners},
    fleet::{Agent, Spec, Steady},
    kube_api::KubeApi,
};
use nix::sys::signal::Signal;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{net::TcpListener, time::timeout};

use crate::{in_place, soak};

fn at(port: u16) -> SocketAddr {
    format!("{SERVER}:{port}").parse().unwrap()
}

fn rounds() -> u64 {
    if soak() { 50 } else { 6 }
}

fn server_flags() -> [String; 2] {
    [format!("--proxy-server-host={SERVER}"), "--proxy-server-port=8191".to_owned()]
}

/// Waits until the one stream that takes dials was made with the given number of materials.
async fn replaced(agent: &mut Agent, number: u64) -> Result<Duration> {
    agent
        .until(&format!("a stream made with number {number}"), Duration::from_secs(10), |all| {
            all.iter().filter(|(_, state, _)| state == "connected").map(|(_, _, made)| *made).eq([number])
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
        tokio::spawn(endpoint::serve(TcpListener::bind("0.0.0.0:7000").await?));
        let spec = Spec::new("a", 0, 1);
        let server = spec.start(place)?;
        let secret = place.directory.join("secret");
        let swapped = |place: &Place, round: u64| {
            let (certificate, key) = (place.certs.path("agent.crt"), place.certs.path("agent.key"));
            swap(&secret, round, &[("tls.crt", &certificate), ("tls.key", &key)])
        };
        swapped(place, 0)?;
        let mut flags = server_flags().to_vec();
        flags.push(format!("--agent-cert={}", secret.join("tls.crt").display()));
        flags.push(format!("--agent-key={}", secret.join("tls.key").display()));
        let mut agent = Agent::start(place, &flags)?;
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
        let deadline = Instant::now() + Duration::from_secs(5);
        while !agent.process.printed().contains("SIGHUP: files are read again") {
            ensure!(Instant::now() < deadline, "SIGHUP is not heard");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        replaced(&mut agent, rounds() + 1).await?;
        // Half a rotation is none: told, weakened, and the old pair stays in use.
        place.certs.agent()?;
        std::fs::copy(place.certs.path("agent.crt"), secret.join("..data/tls.crt"))?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !agent.status().await?.weakened.iter().any(|line| line.contains("--agent-cert and --agent-key")) {
            ensure!(Instant::now() < deadline, "a broken pair is not told: {:?}", agent.status().await?.weakened);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        std::fs::copy(place.certs.path("agent.key"), secret.join("..data/tls.key"))?;
        replaced(&mut agent, rounds() + 2).await?;
        let asked = steady.end().await?;
        alone(&mut agent).await?;
        ensure!(!agent.status().await?.weakened.iter().any(|line| line.contains("--agent-cert")), "mended");

        // To certificates of another CA, while this server still asks for the old one: what serves goes on.
        let steady = Steady::start(&server.load(), 2, 0).await?;
        let other = place.certs.new_authority()?;
        std::fs::write(place.certs.path("other-ca.crt"), other)?;
        place.certs.agent()?;
        swapped(place, rounds() + 1)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        ensure!(agent.streams().await?.iter().any(|(_, state, made)| state == "connected" && *made == rounds() + 2));
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
        tokio::spawn(endpoint::serve(TcpListener::bind("0.0.0.0:7000").await?));
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
        let mut flags = server_flags().to_vec();
        flags.push(format!("--service-account-token-path={}", file.display()));
        let mut agent = Agent::start(place, &flags)?;
        agent.connected(&["a"]).await?;
        let steady = Steady::start(&server.load(), 8, 2).await?;
        for round in 1..=rounds() {
            write(round)?;
            replaced(&mut agent, round + 1).await?;
            ensure!(api.asked().contains(&(format!("token-{round}"), true)), "{:?}", api.asked());
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

async fn ask(connection: &mut Connection) -> Result<()> {
    connection.send(Bytes::from_static(b"SOURCE 1024\n")).await?;
    let mut got = 0;
    while got < 1024 {
        let bytes = timeout(Duration::from_secs(5), connection.receive()).await.context("no answer")?;
        got += bytes.context("the connection ended")?.len();
    }
    Ok(())
}

/// A stream of a fake server, and a connection that is held on it.
struct Held(Dials, Connection);

impl Held {
    /// The next stream; it has to show the certificate that is on disk now.
    async fn next(fake: &mut Fake, place: &Place) -> Result<Held> {
        let stream = timeout(Duration::from_secs(10), fake.agent()).await.context("no stream within 10 s")??;
        let on_disk = CertificateDer::from_pem_file(place.certs.path("agent.crt"))?;
        ensure!(stream.certificate == Some(on_disk), "an old certificate was shown");
        let dials = Dials::new(stream);
        let connection = dials.dial(&format!("{}:7000", Who::Ours.address())).await?;
        Ok(Held(dials, connection))
    }

    /// It answers, and once it is closed its stream ends.
    async fn end(mut self) -> Result<()> {
        ask(&mut self.1).await?;
        ensure!(!self.0.ended.is_cancelled(), "a stream with a connection was cut");
        self.1.close().await?;
        timeout(Duration::from_secs(5), self.0.ended.cancelled()).await.context("an idle stream stays")
    }
}

#[test]
fn a_ca_rotates_and_each_handshake_shows_what_is_new() {
    /// How many streams are held at once: their number is bounded.
    const MOST: usize = 40;
    in_place(&[], async |place| {
        tokio::spawn(endpoint::serve(TcpListener::bind("0.0.0.0:7000").await?));
        let mut fake = Fake::start(at(8191), &place.certs, Manners::default()).await?;
        let mut flags = Agent::with_certificate(place);
        flags.extend(server_flags());
        let mut agent = Agent::start(place, &flags)?;
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
            ask(connection).await?;
        }
        for each in held {
            each.end().await?;
        }
        let Held(_dials, mut connection) = last;
        ask(&mut connection).await?;
        println!("rotation: {} CAs, {ended} streams with an open connection each, none cut", rounds());
        Ok(())
    });
}
