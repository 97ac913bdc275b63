//! Servers without manners: the agent neither panics nor grows, and serves the next good one.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lab::{
    bare::{Place, SERVER, Who, agent, memory},
    certs::{Certs, ServerCert},
    endpoint,
    fake::{Dials, Fake, Manners},
    hostile::Attack,
    isolated::isolated,
    process::Process,
};

const PORT: u16 = 8091;
/// More than every budget of the agent together.
const MOST_MIB: f64 = 192.0;

#[test]
fn a_hostile_server_neither_breaks_the_agent_nor_makes_it_grow() {
    let directory = tempfile::tempdir().unwrap();
    isolated(&[SERVER, Who::Ours.address()], || {
        let place = Place { directory: directory.path().to_path_buf(), certs: Certs::new(directory.path())? };
        place.certs.server(ServerCert::Good)?;
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(attack(&place))
    })
    .unwrap();
}

async fn attack(place: &Place) -> Result<()> {
    let soak = std::env::var_os("NODEGUARD_SOAK").is_some();
    let (least, packets) = if soak { (Duration::from_secs(600), 20_000) } else { (Duration::ZERO, 3000) };
    tokio::spawn(endpoint::serve(tokio::net::TcpListener::bind("0.0.0.0:7000").await?));
    let address = format!("{}:7000", Who::Ours.address());
    let mut process = agent(Who::Ours, place, PORT)?;
    let (started, mut rounds) = (Instant::now(), 0);
    while rounds == 0 || started.elapsed() < least {
        let mut fake = start(place, Manners::default()).await?;
        for attack in Attack::ALL {
            let mut stream = connected(&mut fake).await.with_context(|| format!("before {attack:?}"))?;
            attack.run(&mut stream, &address, packets).await;
            drop(stream);
            unharmed(&mut process).with_context(|| format!("after {attack:?}"))?;
        }
        drop(fake);
        manners(place, &mut process).await?;
        rounds += 1;
    }
    // The next server is served as if nothing had been.
    let mut fake = start(place, Manners::default()).await?;
    let dials = Dials::new(connected(&mut fake).await?);
    let mut connection = dials.dial(&address).await?;
    connection.send(Bytes::from_static(b"SOURCE 1024\n")).await?;
    let mut got = 0;
    while got < 1024 {
        got += connection.receive().await.context("the connection ended")?.len();
    }
    unharmed(&mut process)?;
    println!(
        "hostile: {rounds} times {} attacks and 4 bad manners in {:.0} s; most memory {:.0} MiB",
        Attack::ALL.len(),
        started.elapsed().as_secs_f64(),
        memory(&process, "VmHWM")? / 1024.0
    );
    Ok(())
}

/// Servers that are bad before the first packet.
async fn manners(place: &Place, process: &mut Process) -> Result<()> {
    let count = |text: &str| Manners { server_count: text.to_owned(), ..Manners::default() };
    let all = [
        Manners { answers: false, ..Manners::default() },
        Manners { pause: Some(Duration::from_millis(250)), ..Manners::default() },
        count("999999999999"),
        count("-1"),
    ];
    for manners in all {
        let fake = start(place, manners.clone()).await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let accepted = fake.accepted.load(Ordering::Relaxed);
        ensure!(accepted <= 30, "{accepted} connections in two seconds: {manners:?}");
        unharmed(process).with_context(|| format!("{manners:?}"))?;
    }
    Ok(())
}

/// A server at the agent's address; the one before may still be letting go of it.
async fn start(place: &Place, manners: Manners) -> Result<Fake> {
    let address = format!("{SERVER}:{PORT}").parse()?;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match Fake::start(address, &place.certs, manners.clone()).await {
            Ok(fake) => return Ok(fake),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn connected(fake: &mut Fake) -> Result<lab::fake::Agent> {
    tokio::time::timeout(Duration::from_secs(30), fake.agent()).await.context("no stream within 30 s")?
}

fn unharmed(process: &mut Process) -> Result<()> {
    process.check()?;
    let printed = process.printed();
    ensure!(!printed.contains("panicked"), "a panic:\n{printed}");
    let mib = memory(process, "VmRSS")? / 1024.0;
    ensure!(mib < MOST_MIB, "{mib:.0} MiB");
    Ok(())
}
