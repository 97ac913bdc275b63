//! SIGTERM: every stream is drained at once, late dials are served, open ones to their end, and the agent exits with 0.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use lab::{
    bare::{SERVER, Who},
    endpoint,
    fake::{Dials, Fake, Manners},
    fleet::Agent,
};
use nix::sys::signal::Signal;
use tokio::{net::TcpListener, time::timeout};

use crate::in_place;

#[test]
fn sigterm_drains_every_stream_and_serves_what_is_late_and_what_is_open() {
    in_place(&[], async |place| {
        tokio::spawn(endpoint::serve(TcpListener::bind("0.0.0.0:7000").await?));
        let address = format!("{}:7000", Who::Ours.address());
        let manners = |id: &str| Manners { server_id: id.to_owned(), ..Manners::default() };
        let mut fakes = [
            Fake::start(format!("{SERVER}:8191").parse()?, &place.certs, manners("a")).await?,
            Fake::start(format!("{SERVER}:8192").parse()?, &place.certs, manners("b")).await?,
        ];
        let mut flags = Agent::with_certificate(place);
        flags.push(format!("--proxy-server-host={SERVER}:8191,{SERVER}:8192"));
        let mut agent = Agent::start(place, &flags)?;
        let mut dials = Vec::new();
        for fake in &mut fakes {
            dials.push(Dials::new(timeout(Duration::from_secs(10), fake.agent()).await.context("no stream")??));
        }
        let mut open = dials[0].dial(&address).await?;
        agent.process.signal(Signal::SIGTERM)?;
        // Idle streams hear of it, too.
        for dials in &dials {
            timeout(Duration::from_millis(400), dials.drained.cancelled()).await.context("no DRAIN at once")?;
        }
        let mut late = dials[1].dial(&address).await.context("a dial that was under way")?;
        for connection in [&mut open, &mut late] {
            connection.send(Bytes::from_static(b"SOURCE 100000\n")).await?;
            let mut got = 0;
            while got < 100_000 {
                got += timeout(Duration::from_secs(5), connection.receive()).await?.context("cut")?.len();
            }
        }
        late.close().await?;
        // One stream is idle and ends; the other goes on as long as its connection.
        timeout(Duration::from_secs(5), dials[1].ended.cancelled()).await.context("an idle stream stays")?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        ensure!(!dials[0].ended.is_cancelled(), "a stream with a connection was cut");
        agent.process.check()?;
        open.close().await?;
        let status = agent.process.wait(Duration::from_secs(5))?;
        ensure!(status.code() == Some(0), "{status}:\n{}", agent.process.printed());
        ensure!(agent.process.printed().contains("clean=true"), "{}", agent.process.printed());
        for fake in &fakes {
            let accepted = fake.accepted.load(std::sync::atomic::Ordering::Relaxed);
            ensure!(accepted == 1, "{accepted} connections: a draining agent makes no new stream");
        }
        Ok(())
    });
}

#[test]
fn a_second_signal_ends_the_wait() {
    in_place(&[], async |place| {
        tokio::spawn(endpoint::serve(TcpListener::bind("0.0.0.0:7000").await?));
        let mut fake = Fake::start(format!("{SERVER}:8191").parse()?, &place.certs, Manners::default()).await?;
        let mut flags = Agent::with_certificate(place);
        flags.push(format!("--proxy-server-host={SERVER}:8191"));
        let mut agent = Agent::start(place, &flags)?;
        let dials = Dials::new(timeout(Duration::from_secs(10), fake.agent()).await.context("no stream")??);
        let _open = dials.dial(&format!("{}:7000", Who::Ours.address())).await?;
        agent.process.signal(Signal::SIGTERM)?;
        timeout(Duration::from_secs(5), dials.drained.cancelled()).await.context("no DRAIN")?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        agent.process.check()?;
        agent.process.signal(Signal::SIGTERM)?;
        ensure!(agent.process.wait(Duration::from_secs(8))?.code() == Some(0));
        ensure!(agent.process.printed().contains("clean=false"));
        Ok::<_, anyhow::Error>(())
    });
}
