//! Many connections, held and opened and closed; closes right behind queued bytes.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lab::{
    bare::{Who, agent, memory, server},
    client::pattern,
    load::{Load, request},
    process::Process,
    servers::{
        eventually,
        fake::{Fake, Manners},
    },
};
use tokio::{io::AsyncReadExt, net::TcpListener, task::JoinSet, time::timeout};

use crate::{ENDPOINT, PORT, in_place, soak};

#[test]
fn many_connections_come_and_go_without_an_error_or_a_leak() {
    let (held, rate, seconds) = if soak() { (10_000, 1000, 60) } else { (500, 200, 4) };
    in_place(&[], async |place| {
        // In this process it would share the limit of descriptors with the load.
        let mut endpoint = std::process::Command::new(lab::lab::target()?.join("nodeguard-tunnel-bench"));
        endpoint.args(["endpoint", "0.0.0.0:7000"]);
        let _endpoint = Process::start("endpoint", endpoint, &place.directory.join("endpoint.log"))?;
        let server = server(place)?;
        let process = agent(Who::Ours, place, PORT)?;
        let load = server.load();
        eventually("a tunnel", Duration::from_secs(10), async || Ok(load.connect().await.is_ok())).await?;
        // The same once before, shorter: what a load allocates for good, and the code that it runs, is there when the baseline is taken.
        let open = load.connect_all(held).await?;
        let (_, failed, _) = come_and_go(&load, rate, Duration::from_secs(seconds.min(10))).await;
        ensure!(failed.is_empty(), "failed in the round before: {failed:?}");
        drop(open);
        let before = at_rest(&process).await?;

        let open = load.connect_all(held).await?;
        let (came, failed, took) = come_and_go(&load, rate, Duration::from_secs(seconds)).await;
        let mut held_on = JoinSet::new();
        for mut stream in open {
            held_on.spawn(
                async move { matches!(timeout(Duration::from_secs(20), request(&mut stream)).await, Ok(Ok(()))) },
            );
        }
        let stuck = held_on.join_all().await.into_iter().filter(|answered| !answered).count();
        let after = at_rest(&process).await?;
        println!(
            "load: {held} held for {:.0} s, {came} opened and closed ({:.0} per second), {} failed, {stuck} of the held did not answer; at rest {:.1} MiB and {} descriptors before, {:.1} MiB and {} after",
            took.as_secs_f64(),
            came as f64 / took.as_secs_f64(),
            failed.values().sum::<usize>(),
            before.0,
            before.1,
            after.0,
            after.1
        );
        ensure!(stuck == 0, "{stuck} held connections did not answer");
        ensure!(failed.is_empty(), "{failed:?}");
        ensure!(after.0 <= before.0 * 1.1 + 1.0, "memory did not return");
        ensure!(after.1 as f64 <= before.1 as f64 * 1.1 + 2.0, "descriptors did not return");
        Ok(())
    });
}

/// Opens connections at this rate, a request each, and closes them: how many were answered, how many failed and why, how long it took.
async fn come_and_go(load: &Load, rate: u32, time: Duration) -> (usize, BTreeMap<String, usize>, Duration) {
    let (errors, done): (Arc<Mutex<BTreeMap<String, usize>>>, _) = (Arc::default(), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    let (started, mut ticks) = (Instant::now(), tokio::time::interval(Duration::from_millis(10)));
    let mut asked = 0;
    while started.elapsed() < time {
        ticks.tick().await;
        let due = (started.elapsed().as_secs_f64() * f64::from(rate)) as usize;
        for _ in asked..due {
            let (load, errors, done) = (load.clone(), Arc::clone(&errors), Arc::clone(&done));
            clients.spawn(async move {
                let tried = async { request(&mut load.connect().await?).await }.await;
                match tried {
                    Ok(()) => drop(done.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => *errors.lock().unwrap().entry(format!("{error:#}")).or_default() += 1,
                }
            });
        }
        asked = due;
        while clients.try_join_next().is_some() {}
    }
    while clients.join_next().await.is_some() {}
    let errors = std::mem::take(&mut *errors.lock().unwrap());
    (done.load(Ordering::Relaxed), errors, started.elapsed())
}

/// Memory in MiB and descriptors, once every connection is gone.
async fn at_rest(process: &Process) -> Result<(f64, usize)> {
    let descriptors = || Ok::<_, std::io::Error>(std::fs::read_dir(format!("/proc/{}/fd", process.id()))?.count());
    let deadline = Instant::now() + Duration::from_secs(20);
    while descriptors()? > 40 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    Ok((memory(process.id(), "VmRSS")? / 1024.0, descriptors()?))
}

#[test]
fn a_close_behind_eight_mib_of_queued_bytes_loses_none_of_them() {
    const SIZE: usize = 8 << 20;
    let rounds = if soak() { 200 } else { 20 };
    in_place(&[], async |place| {
        let listener = TcpListener::bind(ENDPOINT).await?;
        let mut fake = Fake::start(place, PORT, Manners::default()).await?;
        let _process = agent(Who::Ours, place, PORT)?;
        let dials = fake.dials().await?;
        let bytes = Bytes::from(pattern(5, SIZE));
        let mut reset = 0;
        for round in 0..rounds {
            let connection = dials.dial(ENDPOINT).await?;
            let (mut backend, _) = listener.accept().await?;
            let reader = tokio::spawn(async move {
                // All of it is queued before the first byte is read.
                tokio::time::sleep(Duration::from_millis(150)).await;
                let mut got = Vec::with_capacity(SIZE);
                backend.read_to_end(&mut got).await.map(|_| got)
            });
            for start in (0..SIZE).step_by(32 << 10) {
                connection.send(bytes.slice(start..start + (32 << 10))).await?;
            }
            connection.close().await?;
            match timeout(Duration::from_secs(30), reader).await.context("stuck")?? {
                Ok(got) => ensure!(got == bytes, "round {round}: {} bytes and a clean end", got.len()),
                Err(_) => reset += 1,
            }
        }
        println!(
            "load: a close right behind 8 MiB, {rounds} times: all bytes arrived {} times, {reset} resets",
            rounds - reset
        );
        ensure!(reset == 0, "{reset} connections were reset");
        Ok(())
    });
}
