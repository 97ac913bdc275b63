//! SIGTERM: every stream is drained at once, late dials are served, open ones to their end, and the agent exits with 0.

use std::time::Duration;

use anyhow::{Context, ensure};
use lab::{
    bare::Agent,
    servers::fake::{Fake, Manners},
};
use nix::sys::signal::Signal;

use crate::{ENDPOINT, in_place, serve_endpoint};

#[test]
fn sigterm_drains_every_stream_and_serves_what_is_late_and_what_is_open() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let manners = |server_id| Manners { server_id, ..Manners::default() };
        let mut fakes = [Fake::start(place, 8191, manners("a")).await?, Fake::start(place, 8192, manners("b")).await?];
        let mut agent = Agent::start(place, "10.0.0.1:8191,10.0.0.1:8192", &[])?;
        let dials = [fakes[0].dials().await?, fakes[1].dials().await?];
        let mut open = dials[0].dial(ENDPOINT).await?;
        agent.process.signal(Signal::SIGTERM)?;
        // Idle streams hear of it, too.
        for dials in &dials {
            dials.drains(Duration::from_millis(400)).await?;
        }
        let mut late = dials[1].dial(ENDPOINT).await.context("a dial that was under way")?;
        for connection in [&mut open, &mut late] {
            connection.fetch(100_000).await?;
        }
        late.close().await?;
        // One stream is idle and ends; the other goes on as long as its connection.
        dials[1].ends().await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        ensure!(!dials[0].ended.is_cancelled(), "a stream with a connection was cut");
        agent.process.check()?;
        open.close().await?;
        let status = agent.process.wait(Duration::from_secs(5))?;
        ensure!(status.code() == Some(0), "{status}:\n{}", agent.process.printed());
        ensure!(agent.process.printed().contains("clean=true"), "{}", agent.process.printed());
        for fake in &fakes {
            let accepted = fake.accepted();
            ensure!(accepted == 1, "{accepted} connections: a draining agent makes no new stream");
        }
        Ok(())
    });
}

#[test]
fn a_second_signal_ends_the_wait() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let mut fake = Fake::start(place, 8191, Manners::default()).await?;
        let mut agent = Agent::start(place, "10.0.0.1:8191", &[])?;
        let dials = fake.dials().await?;
        let _open = dials.dial(ENDPOINT).await?;
        agent.process.signal(Signal::SIGTERM)?;
        dials.drains(Duration::from_secs(5)).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        agent.process.check()?;
        agent.process.signal(Signal::SIGTERM)?;
        ensure!(agent.process.wait(Duration::from_secs(8))?.code() == Some(0));
        ensure!(agent.process.printed().contains("clean=false"));
        Ok(())
    });
}
