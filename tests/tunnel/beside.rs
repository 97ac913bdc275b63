//! A hostile server beside a healthy one: who comes through the healthy one notices nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{
    bare::{SERVER, Who, memory},
    endpoint,
    fake::{Fake, Manners},
    fleet::{Agent, Spec, Steady},
    hostile::Attack,
};
use tokio::{net::TcpListener, time::timeout};

use crate::{in_place, soak};

/// More than every budget of the agent together.
const MOST_MIB: f64 = 192.0;

#[test]
fn a_hostile_server_does_not_reach_a_healthy_one() {
    let (least, packets) = if soak() { (Duration::from_secs(600), 20_000) } else { (Duration::ZERO, 1000) };
    in_place(&[], async |place| {
        tokio::spawn(endpoint::serve(TcpListener::bind("0.0.0.0:7000").await?));
        let server = Spec::new("healthy", 0, 1).start(place)?;
        let manners = Manners { server_id: "hostile".to_owned(), ..Manners::default() };
        let mut fake = Fake::start(format!("{SERVER}:8292").parse()?, &place.certs, manners).await?;
        let mut flags = Agent::with_certificate(place);
        flags.push(format!("--proxy-server-host={SERVER}:8191,{SERVER}:8292"));
        let mut agent = Agent::start(place, &flags)?;
        agent
            .until("the healthy server", Duration::from_secs(10), |all| {
                all.iter().any(|(server, state, _)| server == "healthy" && state == "connected")
            })
            .await?;
        let steady = Steady::start(&server.load(), 4, 2).await?;
        let address = format!("{}:7000", Who::Ours.address());
        let (started, mut rounds, mut most) = (Instant::now(), 0, 0.0f64);
        while rounds == 0 || started.elapsed() < least {
            for attack in Attack::ALL {
                let next = timeout(Duration::from_secs(30), fake.agent()).await;
                let mut stream = next.context("no stream within 30 s").with_context(|| format!("{attack:?}"))??;
                attack.run(&mut stream, &address, packets).await;
                drop(stream);
                agent.process.check()?;
                most = most.max(memory(&agent.process, "VmRSS")? / 1024.0);
                ensure!(most < MOST_MIB, "{most:.0} MiB after {attack:?}");
            }
            rounds += 1;
        }
        let asked = steady.end().await?;
        ensure!(!agent.process.printed().contains("panicked"), "a panic:\n{}", agent.process.printed());
        ensure!(!agent.process.printed().contains("tunnel lost server=10.0.0.1:8191"), "the healthy stream was lost");
        println!(
            "beside: {rounds} times {} attacks in {:.0} s, {asked} requests through the healthy server, none failed; most memory {most:.0} MiB",
            Attack::ALL.len(),
            started.elapsed().as_secs_f64()
        );
        Ok(())
    });
}
