//! Owns holding the kernel half: what anybody else removes or changes is noticed, reported, counted and mended.
//! Called by `run`, as one of its parts.
//! Must never act in silence: whatever it mends was open or could have been.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::{
    daemon::{
        edit::{cut, hold_edge},
        state::Guard,
    },
    kernel::tables::apply::MendScope,
    sys::lock::lock,
};

/// How often the daemon checks that every program is attached and the right epoch is active: a dozen system calls.
const GLANCE: Duration = Duration::from_millis(100);
/// The shortest time between two checks of pins and tables. A check may cost at most a hundredth of the time.
const LOOK: Duration = Duration::from_millis(250);
const SHARE: u32 = 100;
/// The longest time between two checks, and the time between two checks of what decides nothing by itself.
const LOOK_ALWAYS: Duration = Duration::from_secs(3);

/// Checks and mends until the daemon ends.
pub(crate) async fn hold(guard: Arc<Guard>) {
    let mut looked = Instant::now();
    let mut looked_at_all = Instant::now();
    let mut pause = LOOK;
    loop {
        tokio::time::sleep(GLANCE).await;
        let look = if looked_at_all.elapsed() >= LOOK_ALWAYS { MendScope::All } else { MendScope::Deciding };
        let due = look == MendScope::All || looked.elapsed() >= pause || !at_a_glance(&guard);
        if !due {
            continue;
        }
        let holder = Arc::clone(&guard);
        let done = tokio::task::spawn_blocking(move || {
            let before = processor_time();
            let mended = mend(&holder, look);
            (mended, processor_time().saturating_sub(before))
        })
        .await;
        looked = Instant::now();
        let (mended, cost) = match done {
            Ok(done) => done,
            Err(error) => (Err(error.into()), Duration::ZERO),
        };
        pause = (cost * SHARE).clamp(LOOK, LOOK_ALWAYS);
        if look == MendScope::All {
            looked_at_all = looked;
        }
        match mended {
            Ok(mended) if mended.is_empty() => {}
            Ok(mended) => {
                guard.mended.fetch_add(mended.len() as u64, Ordering::Relaxed);
                tracing::error!(
                    mended = mended.join(", "),
                    "somebody removed or changed what holds this node closed; it is mended"
                );
                // Connections that were admitted meanwhile are cut.
                let cutter = Arc::clone(&guard);
                tokio::task::spawn_blocking(move || cut(&cutter));
            }
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "what holds this node closed cannot be checked or mended")
            }
        }
    }
}

/// The processor time that this thread has used.
fn processor_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Whether the programs and the active epoch are as the daemon left them. It never waits: what is being written now is checked next time.
fn at_a_glance(guard: &Guard) -> bool {
    let attached = guard.programs.try_lock().map_or(true, |programs| programs.all_attached());
    let active = guard.apply.try_lock().map_or(true, |apply| apply.is_active());
    attached && active
}

fn mend(guard: &Guard, look: MendScope) -> anyhow::Result<Vec<String>> {
    let mut mended = lock(&guard.programs).mend()?;
    if look == MendScope::All {
        mended.extend(hold_edge(guard));
    }
    let mut apply = lock(&guard.apply);
    if apply.mend(look)? {
        guard.in_force.store(Arc::new(apply.in_force()));
        mended.push("tables of the ruleset".to_owned());
    }
    Ok(mended)
}
