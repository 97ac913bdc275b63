//! One endpoint that never reads, one that reads slowly: what becomes of them, and of everybody else.

use std::{
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lab::{
    bare::{POLICY, Place, memory, ours},
    load::serve,
    process::Process,
    servers::fake::{Connection, Dials, Fake, Manners},
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{ENDPOINT, PORT, in_place, soak};

/// Where endpoints are that read as a test says.
const ODD: &str = "10.0.0.4";
const CHUNK: usize = 32 << 10;
/// What an agent has beside what waits for backends: itself, and what is on its way through TLS and HTTP/2, both ways.
const BESIDE_MIB: f64 = 48.0;

/// An agent with these flags under a server in Rust, an endpoint that answers, and a place for one that does not.
struct Rig {
    process: Process,
    dials: Arc<Dials>,
    odd: TcpListener,
    _fake: Fake,
}

impl Rig {
    async fn new(place: &Place, flags: &[&str]) -> Result<Rig> {
        serve(ENDPOINT).await?;
        let odd = TcpListener::bind((ODD, 7000)).await?;
        let mut fake = Fake::start(place, PORT, Manners::default()).await?;
        let process = ours(place, PORT, POLICY, flags)?;
        Ok(Rig { process, dials: Arc::new(fake.dials().await?), odd, _fake: fake })
    }

    /// A connection to an endpoint that the test plays.
    async fn odd(&self) -> Result<(Connection, TcpStream)> {
        let connection = self.dials.dial(&format!("{ODD}:7000")).await?;
        Ok((connection, self.odd.accept().await?.0))
    }

    fn peak(&self) -> Result<f64> {
        Ok(memory(self.process.id(), "VmHWM")? / 1024.0)
    }
}

fn with_rig(flags: &[&str], code: impl AsyncFnOnce(&mut Rig) -> Result<()> + Send) {
    in_place(&[ODD], async |place| code(&mut Rig::new(place, flags).await?).await);
}

/// Small requests over connections of their own until told to end. Each has an answer, or this fails.
struct Others {
    over: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: JoinSet<Result<()>>,
}

impl Others {
    async fn start(dials: &Arc<Dials>) -> Result<Others> {
        let mut others = Others { over: Arc::default(), answered: Arc::default(), clients: JoinSet::new() };
        for _ in 0..4 {
            let mut connection = dials.dial(ENDPOINT).await?;
            let (over, answered) = (Arc::clone(&others.over), Arc::clone(&others.answered));
            others.clients.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    connection.fetch(2000).await.context("one of the others")?;
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        Ok(others)
    }

    async fn end(mut self) -> Result<usize> {
        self.over.store(true, Ordering::Relaxed);
        while let Some(ended) = self.clients.join_next().await {
            ended??;
        }
        Ok(self.answered.load(Ordering::Relaxed))
    }
}

/// Sends until the connection is cut or everything is sent; whether it was cut.
async fn flood(connection: &Connection, mib: usize) -> Result<bool> {
    let chunk = Bytes::from(vec![7; CHUNK]);
    for _ in 0..(mib << 20) / CHUNK {
        if connection.ended() {
            return Ok(true);
        }
        connection.send(chunk.clone()).await?;
    }
    Ok(false)
}

async fn cut(connection: &mut Connection) -> Result<()> {
    let ended = timeout(Duration::from_secs(10), connection.receive()).await.context("never cut")?;
    ensure!(ended.is_none(), "the endpoint said something");
    Ok(())
}

/// Reads so many MiB a second, to the end.
async fn read_slowly(mut stream: TcpStream, mib_per_second: f64) -> std::io::Result<usize> {
    let (started, mut got, mut buffer) = (Instant::now(), 0, vec![0; 256 << 10]);
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(got),
            count => got += count,
        }
        let due = got as f64 / f64::from(1 << 20) / mib_per_second;
        sleep(Duration::from_secs_f64(due).saturating_sub(started.elapsed())).await;
    }
}

#[test]
fn an_endpoint_that_never_reads_is_reset_alone_and_memory_stays_within_the_budget() {
    with_rig(&["--memory-budget=64MiB", "--connection-budget=4MiB"], async |rig| {
        let others = Others::start(&rig.dials).await?;
        let rounds = if soak() { 20 } else { 3 };
        for round in 0..rounds {
            let (mut connection, mut endpoint) = rig.odd().await?;
            // More than the budget and the sockets hold.
            if !flood(&connection, 256).await? {
                cut(&mut connection).await.with_context(|| format!("round {round}"))?;
            }
            // Truncation is a RST: after the bytes that had arrived an error, and no clean end.
            let ended = endpoint.read_to_end(&mut Vec::new()).await;
            ensure!(ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "a clean end");
        }
        let answered = others.end().await?;
        let peak = rig.peak()?;
        println!(
            "isolation: {rounds} floods of an endpoint that never reads: {answered} requests of others answered, at most {peak:.0} MiB"
        );
        ensure!(answered >= 4 * rounds, "{answered} requests of the others");
        ensure!(peak < 64.0 + BESIDE_MIB, "{peak:.0} MiB");
        Ok(())
    });
}

#[test]
fn many_that_never_read_share_the_budget_and_one_that_reads_has_its_part_of_it() {
    with_rig(&["--memory-budget=32MiB", "--connection-budget=8MiB"], async |rig| {
        let mut held = Vec::new();
        for _ in 0..12 {
            let (connection, endpoint) = rig.odd().await?;
            flood(&connection, 18).await?;
            held.push((connection, endpoint));
        }
        // Long enough that nobody else counts as served: it sets the pace then.
        sleep(Duration::from_millis(1200)).await;
        let (connection, endpoint) = rig.odd().await?;
        let reader = tokio::spawn(read_slowly(endpoint, 64.0));
        ensure!(!flood(&connection, 24).await?, "the one that reads was cut");
        connection.close().await?;
        let got = timeout(Duration::from_secs(20), reader).await.context("stuck")???;
        let peak = rig.peak()?;
        println!("isolation: 12 that never read beside one that reads: at most {peak:.0} MiB");
        ensure!(got == 24 << 20, "{got} bytes");
        ensure!(peak < 32.0 + BESIDE_MIB, "{peak:.0} MiB");
        Ok(())
    });
}

#[test]
fn a_backend_that_takes_nothing_is_reset_after_the_stall_timeout_also_without_a_flood() {
    with_rig(&["--stall-timeout=1s", "--connection-budget=32MiB"], async |rig| {
        let (mut connection, _endpoint) = rig.odd().await?;
        // Within the budget; more than the sockets hold.
        let started = Instant::now();
        ensure!(!flood(&connection, 16).await?, "cut within the budget");
        cut(&mut connection).await?;
        ensure!(started.elapsed() > Duration::from_secs(1), "cut after {:?}", started.elapsed());
        Ok(())
    });
}

#[test]
fn an_endpoint_that_reads_slowly_gets_every_byte() {
    let mib = if soak() { 600 } else { 90 };
    // Alone, it sets the pace.
    with_rig(&["--memory-budget=8MiB", "--connection-budget=2MiB"], async |rig| {
        let (connection, endpoint) = rig.odd().await?;
        let reader = tokio::spawn(read_slowly(endpoint, 24.0));
        ensure!(!flood(&connection, mib).await?, "cut");
        connection.close().await?;
        let got = timeout(Duration::from_secs(60), reader).await.context("stuck")???;
        ensure!(got == mib << 20, "{got} bytes");
        let peak = rig.peak()?;
        ensure!(peak < 8.0 + BESIDE_MIB, "{peak:.0} MiB");
        Ok(())
    });
    // Beside others, it has what the budget gives, and they wait for nothing.
    with_rig(&[], async |rig| {
        let others = Others::start(&rig.dials).await?;
        let (connection, endpoint) = rig.odd().await?;
        let reader = tokio::spawn(read_slowly(endpoint, 12.0));
        ensure!(!flood(&connection, 60).await?, "cut");
        connection.close().await?;
        let got = timeout(Duration::from_secs(60), reader).await.context("stuck")???;
        let answered = others.end().await?;
        println!("isolation: 60 MiB for a slow reader, {answered} requests of others meanwhile");
        ensure!(got == 60 << 20 && answered > 4, "{got} bytes, {answered} requests");
        Ok(())
    });
}
