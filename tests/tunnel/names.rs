//! A name that moves while it is dialled: whatever it resolves to is judged, and that very address is dialled.

use std::{
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, ensure};
use lab::{
    bare::{Place, Who, agent},
    net::hosts,
    servers::{
        Listener,
        fake::{Fake, Manners},
    },
};

use crate::{PORT, in_place, soak};

/// Not in the policy of `bare`.
const FORBIDDEN: &str = "10.0.9.2";
/// The allowed address; the two differ in one byte of the file.
const HOSTS: &str = "10.0.0.2 moving.example\n";
const THE_BYTE: u64 = 5;

#[test]
fn a_name_that_moves_to_a_forbidden_address_is_never_dialled_there() {
    let tries = if soak() { 1000 } else { 200 };
    in_place(&[FORBIDDEN], async |place| {
        let file = hosts(HOSTS)?;
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
        let dialled = dial(place, tries).await;
        over.store(true, Ordering::Relaxed);
        let moves = mover.join().unwrap()?;
        let (allowed, refused) = dialled?;
        ensure!(moves > 100 && allowed > 0 && refused > 0, "{moves} moves, {allowed} dialled, {refused} refused");
        println!(
            "names: {tries} dials of a name that moved {moves} times: {allowed} dialled, {refused} refused, none at the forbidden address"
        );
        Ok(())
    });
}

async fn dial(place: &Place, tries: usize) -> Result<(usize, usize)> {
    let (at_allowed, at_forbidden) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let counting = async |address: &str, count: &Arc<AtomicUsize>| {
        let count = Arc::clone(count);
        let counted = move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            async { Ok(()) }
        };
        Listener::start(format!("{address}:7000").parse()?, counted).await
    };
    let _allowed = counting(Who::Ours.address(), &at_allowed).await?;
    let _forbidden = counting(FORBIDDEN, &at_forbidden).await?;
    let mut fake = Fake::start(place, PORT, Manners::default()).await?;
    let _process = agent(Who::Ours, place, PORT)?;
    let (dials, mut allowed, mut refused) = (fake.dials().await?, 0, 0);
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
