//! A name that moves while it is dialled: whatever it resolves to is judged, and that very address is dialled.

use std::{
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::{
    bare::{Place, SERVER, Who, agent},
    certs::{Certs, ServerCert},
    fake::{Dials, Fake, Manners},
    isolated::{hosts, isolated},
};
use tokio::net::TcpListener;

/// Not in the policy of `bare`.
const FORBIDDEN: &str = "10.0.9.2";
/// The allowed address; the two differ in one byte of the file.
const HOSTS: &str = "10.0.0.2 moving.example\n";
const THE_BYTE: u64 = 5;

#[test]
fn a_name_that_moves_to_a_forbidden_address_is_never_dialled_there() {
    let tries = if std::env::var_os("NODEGUARD_SOAK").is_some() { 1000 } else { 200 };
    let directory = tempfile::tempdir().unwrap();
    isolated(&[SERVER, Who::Ours.address(), FORBIDDEN], || {
        let file = hosts(HOSTS)?;
        let place = Place { directory: directory.path().to_path_buf(), certs: Certs::new(directory.path())? };
        place.certs.server(ServerCert::Good)?;
        let over = Arc::new(AtomicBool::new(false));
        let (moved, writer) = (Arc::clone(&over), file.reopen()?);
        let mover = std::thread::spawn(move || -> std::io::Result<usize> {
            let mut moves = 0;
            while !moved.load(Ordering::Relaxed) {
                writer.write_all_at(if moves % 2 == 0 { b"9" } else { b"0" }, THE_BYTE)?;
                moves += 1;
                std::thread::sleep(Duration::from_micros(300));
            }
            Ok(moves)
        });
        let dialled =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(dial(&place, tries));
        over.store(true, Ordering::Relaxed);
        let moves = mover.join().unwrap()?;
        let (allowed, refused) = dialled?;
        ensure!(moves > 100 && allowed > 0 && refused > 0, "{moves} moves, {allowed} dialled, {refused} refused");
        println!("names: {tries} dials of a name that moved {moves} times: {allowed} dialled, {refused} refused, none at the forbidden address");
        Ok(())
    })
    .unwrap();
}

async fn dial(place: &Place, tries: usize) -> Result<(usize, usize)> {
    let (at_allowed, at_forbidden) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    for (address, count) in [(Who::Ours.address(), &at_allowed), (FORBIDDEN, &at_forbidden)] {
        let (listener, count) = (TcpListener::bind((address, 7000)).await?, Arc::clone(count));
        tokio::spawn(async move {
            while listener.accept().await.is_ok() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let mut fake = Fake::start(format!("{SERVER}:8091").parse()?, &place.certs, Manners::default()).await?;
    let _process = agent(Who::Ours, place, 8091)?;
    let stream = tokio::time::timeout(Duration::from_secs(10), fake.agent()).await.context("no stream")??;
    let (dials, mut allowed, mut refused) = (Dials::new(stream), 0, 0);
    for _ in 0..tries {
        match dials.dial("moving.example:7000").await {
            Ok(connection) => {
                allowed += 1;
                connection.close().await?;
            }
            Err(error) => {
                ensure!(error.to_string().contains("no entry of tunnel.dial names this address"), "{error}");
                refused += 1;
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    ensure!(at_forbidden.load(Ordering::Relaxed) == 0, "dialled at the forbidden address");
    ensure!(at_allowed.load(Ordering::Relaxed) == allowed, "dials that were answered and not made");
    Ok((allowed, refused))
}
