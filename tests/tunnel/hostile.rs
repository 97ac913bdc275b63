//! Servers without manners: the agent neither panics nor grows, and serves the next good one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use guard_policy::visible::acts;
use lab::{
    bare::{Agent, Place, Who, agent, memory},
    process::Process,
    servers::{
        eventually,
        fake::{Fake, Manners, dial},
        hostile::Attack,
    },
};
use nodeguard::report::status_tables;

use crate::{ENDPOINT, PORT, in_place, serve_endpoint, soak};

/// More than every budget of the agent together.
pub(crate) const MOST_MIB: f64 = 192.0;

#[test]
fn a_hostile_server_neither_breaks_the_agent_nor_makes_it_grow() {
    in_place(&[], async |place| attack(place).await);
}

#[test]
fn what_a_server_writes_neither_ends_a_line_nor_steers_a_terminal() {
    in_place(&[], async |place| {
        let mut fake = Fake::start(place, PORT, Manners::default()).await?;
        let agent = Agent::start(place, &format!("10.0.0.1:{PORT}"), &[])?;
        let screen = "\u{1b}[2J\u{1b}[HDaemon:     running\nHolding:    yes (8 of 8 programs attached, epoch 7)\n\u{9b}8m\u{202e}";
        let answer = {
            let mut stream = fake.agent().await?;
            stream.outbound.send(Ok(dial(screen, 1))).await?;
            stream.answer(1).await?
        };
        ensure!(answer.is_err(), "{answer:?}");
        let status = agent.status().await?;
        ensure!(
            status.last_refused_dials.iter().any(|dial| dial.requested == screen),
            "{:?}",
            status.last_refused_dials
        );
        let mut shown = Vec::new();
        status_tables::write(&status, &mut shown)?;
        for text in [String::from_utf8(shown)?, agent.process.printed()] {
            ensure!(text.contains("\\u{1b}[2J"), "it is shown:\n{text}");
            ensure!(!text.chars().any(|character| acts(character) && character != '\n'), "{text:?}");
            ensure!(!text.lines().any(|line| line.starts_with("Holding:    yes")), "a line of the server's:\n{text}");
        }
        Ok(())
    });
}

async fn attack(place: &Place) -> Result<()> {
    let (least, packets) = if soak() { (Duration::from_secs(600), 20_000) } else { (Duration::ZERO, 3000) };
    serve_endpoint().await?;
    let mut process = agent(Who::Ours, place, PORT)?;
    let (started, mut rounds) = (Instant::now(), 0);
    while rounds == 0 || started.elapsed() < least {
        let mut fake = start(place, Manners::default()).await?;
        for attack in Attack::value_variants() {
            let mut stream = fake.agent().await.with_context(|| format!("before {attack:?}"))?;
            attack.run(&mut stream, ENDPOINT, packets).await;
            drop(stream);
            unharmed(&mut process).with_context(|| format!("after {attack:?}"))?;
        }
        drop(fake);
        manners(place, &mut process).await?;
        rounds += 1;
    }
    // The next server is served as if nothing had been.
    let mut fake = start(place, Manners::default()).await?;
    fake.dials().await?.dial(ENDPOINT).await?.fetch(1024).await?;
    unharmed(&mut process)?;
    println!(
        "hostile: {rounds} times {} attacks and 4 bad manners in {:.0} s; most memory {:.0} MiB",
        Attack::value_variants().len(),
        started.elapsed().as_secs_f64(),
        memory(process.id(), "VmHWM")? / 1024.0
    );
    Ok(())
}

/// Servers that are bad before the first packet.
async fn manners(place: &Place, process: &mut Process) -> Result<()> {
    let count = |server_count| Manners { server_count, ..Manners::default() };
    let all = [
        Manners { answers: false, ..Manners::default() },
        Manners { pause: Some(Duration::from_millis(250)), ..Manners::default() },
        count("999999999999"),
        count("-1"),
    ];
    for manners in all {
        let fake = start(place, manners.clone()).await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let accepted = fake.accepted();
        ensure!(accepted <= 30, "{accepted} connections in two seconds: {manners:?}");
        unharmed(process).with_context(|| format!("{manners:?}"))?;
    }
    Ok(())
}

/// A server at the agent's address. The one before may not have released the address yet.
async fn start(place: &Place, manners: Manners) -> Result<Fake> {
    let mut started = None;
    eventually("the server's address is free", Duration::from_secs(5), async || {
        started = Fake::start(place, PORT, manners.clone()).await.ok();
        Ok(started.is_some())
    })
    .await?;
    started.context("no server")
}

fn unharmed(process: &mut Process) -> Result<()> {
    process.check()?;
    let printed = process.printed();
    ensure!(!printed.contains("panicked"), "a panic:\n{printed}");
    let mib = memory(process.id(), "VmRSS")? / 1024.0;
    ensure!(mib < MOST_MIB, "{mib:.0} MiB");
    Ok(())
}
