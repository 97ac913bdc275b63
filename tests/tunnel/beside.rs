//! A hostile server beside a healthy one: who comes through the healthy one notices nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use lab::{
    bare::{Agent, connected, memory},
    load::Steady,
    servers::{
        fake::{Fake, Manners},
        hostile::Attack,
        proxy_server::Spec,
    },
};

use crate::{ENDPOINT, hostile::MOST_MIB, in_place, serve_endpoint, soak};

#[test]
fn a_hostile_server_does_not_reach_a_healthy_one() {
    let (least, packets) = if soak() { (Duration::from_secs(600), 20_000) } else { (Duration::ZERO, 1000) };
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let server = Spec::new("healthy", 0, 1).start(place)?;
        let mut fake = Fake::start(place, 8292, Manners { server_id: "hostile", ..Manners::default() }).await?;
        let mut agent = Agent::start(place, "10.0.0.1:8191,10.0.0.1:8292", &[])?;
        agent
            .until("the healthy server", Duration::from_secs(10), |all| {
                connected(all).iter().any(|stream| stream.server_id.as_deref() == Some("healthy"))
            })
            .await?;
        let steady = Steady::start(&server.load(), 4, 2).await?;
        let (started, mut rounds, mut most) = (Instant::now(), 0, 0.0f64);
        while rounds == 0 || started.elapsed() < least {
            for attack in Attack::value_variants() {
                let mut stream = fake.agent().await.with_context(|| format!("{attack:?}"))?;
                attack.run(&mut stream, ENDPOINT, packets).await;
                drop(stream);
                agent.process.check()?;
                most = most.max(memory(agent.process.id(), "VmRSS")? / 1024.0);
                ensure!(most < MOST_MIB, "{most:.0} MiB after {attack:?}");
            }
            rounds += 1;
        }
        let asked = steady.end().await?;
        ensure!(!agent.process.printed().contains("panicked"), "a panic:\n{}", agent.process.printed());
        ensure!(!agent.process.printed().contains("tunnel lost server=10.0.0.1:8191"), "the healthy stream was lost");
        println!(
            "beside: {rounds} times {} attacks in {:.0} s, {asked} requests through the healthy server, none failed; most memory {most:.0} MiB",
            Attack::value_variants().len(),
            started.elapsed().as_secs_f64()
        );
        Ok(())
    });
}
