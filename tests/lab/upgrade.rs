//! A build of another ABI takes over, and back: no gap, the links stay, what can be carried over is.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use lab::{
    client::{Outcome, https, knock, tcp},
    daemon::{Build, packets},
    lab::{KUBELET, Lab, POLICY},
    net::{Who, inside},
    process::until,
};
use nix::sys::signal::Signal;
use nodeguard::report::status::Status;

const ATTEMPTS: usize = 1000;
const KILLS: u64 = 20;

/// The pin directories below the lab's bpffs.
fn pinned(lab: &Lab) -> Vec<PathBuf> {
    fs::read_dir(lab.directory.join("bpf/nodeguard")).unwrap().flatten().map(|entry| entry.path()).collect()
}

fn links(status: &Status) -> Vec<(String, Option<u32>)> {
    assert!(status.programs.iter().all(|program| program.attached), "{:?}", status.programs);
    status.programs.iter().map(|program| (program.name.clone(), program.link_id)).collect()
}

fn programs(status: &Status) -> Vec<Option<u32>> {
    status.programs.iter().map(|program| program.program_id).collect()
}

/// How many links a pin directory holds.
fn held(build: &Path) -> usize {
    fs::read_dir(build.join("links")).map_or(0, Iterator::count)
}

/// Ends the guard in the ordinary way and starts the other build of it.
fn change(lab: &mut Lab) {
    lab.daemon().unwrap().process.stop().unwrap();
    lab.setup.build = lab.setup.build.other();
    lab.start_daemon().unwrap().connected().unwrap();
}

#[test]
fn builds_of_two_abis_follow_each_other_without_a_gap() {
    let mut lab = Lab::new(POLICY).unwrap();
    let kubelet = Who::Node.at(false, KUBELET);
    let ca = lab.certs.path("ca.crt");
    for way in ["upgrade", "downgrade"] {
        let before = lab.daemon().unwrap().status().unwrap();
        let made = AtomicUsize::new(0);
        let (stranger, peer) = (lab.net.open(Who::Stranger).unwrap(), lab.net.open(Who::Peer).unwrap());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let knocking = scope.spawn(|| knock(stranger, kubelet, ATTEMPTS, &made).unwrap());
            let welcome = scope.spawn(|| {
                let knock = || {
                    let mut admitted = 0;
                    while !over.load(Ordering::Relaxed) {
                        assert_eq!(https(tcp(kubelet), "/healthz", &ca), Outcome::Http(200), "an allowed peer");
                        admitted += 1;
                    }
                    Ok(admitted)
                };
                inside(&peer, knock).unwrap()
            });
            until("attempts", Duration::from_secs(30), || Ok(made.load(Ordering::Relaxed) >= ATTEMPTS / 4)).unwrap();
            // Whatever goes wrong here, the peer ends: the scope waits for it.
            let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| change(&mut lab)));
            let during = made.load(Ordering::Relaxed) < ATTEMPTS;
            over.store(changed.is_err() || !during, Ordering::Relaxed);
            assert!(changed.is_ok() && during, "the attempts were over before the change");
            let strangers = knocking.join().unwrap();
            over.store(true, Ordering::Relaxed);
            assert_eq!(strangers, 0, "a stranger was admitted");
            let admitted = welcome.join().unwrap();
            assert!(admitted > 10);
            println!("{way}: {ATTEMPTS} stranger attempts, 0 admitted; {admitted} of an allowed peer, all admitted");
        });
        // Their pins are where the build that runs looks for them; nothing of the other one is left.
        let daemon = lab.daemon.as_ref().unwrap();
        let after = daemon.status().unwrap();
        assert_eq!(links(&before), links(&after), "{way}: every link stays");
        assert!(programs(&before).iter().zip(programs(&after)).all(|(old, new)| *old != new), "{way}: other programs");
        assert_eq!(pinned(&lab).len(), 1, "{way}: {:?}", pinned(&lab));
        let said = daemon.printed();
        assert!(
            said.contains("map=\"GENERATIONS\"") || said.contains("\"map\":\"GENERATIONS\""),
            "{way}: the map is named\n{said}"
        );
        let denied = packets(&after, "no-selector");
        assert!(denied >= packets(&before, "no-selector") + ATTEMPTS as u64, "{way}: {denied} counted");
        assert_eq!(lab.healthz_dialled("10.0.0.2:10250").unwrap(), Outcome::Http(200));
    }
    assert_eq!(lab.setup.build, Build::Own);
}

#[test]
fn a_takeover_that_was_killed_is_finished_by_the_next_start() {
    let mut lab = Lab::new(POLICY).unwrap();
    let kubelet = Who::Node.at(false, KUBELET);
    let made = AtomicUsize::new(0);
    let stranger = lab.net.open(Who::Stranger).unwrap();
    let mut halves = 0;
    std::thread::scope(|scope| {
        let knocking = scope.spawn(|| knock(stranger, kubelet, ATTEMPTS, &made).unwrap());
        for number in 0..KILLS {
            lab.daemon.take().unwrap().kill().unwrap();
            lab.setup.build = lab.setup.build.other();
            let [old] = &pinned(&lab)[..] else { panic!("{:?}", pinned(&lab)) };
            let mut half = lab.start_unfinished().unwrap();
            if number % 2 == 0 {
                // Killed at some moment of its start: before, amid or after it takes the links over.
                std::thread::sleep(Duration::from_millis(40 + number * 6));
            } else {
                // Killed when it has taken so many.
                let (left, started) = (held(old) - (number / 2 % 7 + 1) as usize, Instant::now());
                while held(old) > left && started.elapsed() < Duration::from_secs(5) {
                    std::thread::yield_now();
                }
            }
            half.signal(Signal::SIGKILL).unwrap();
            half.wait(Duration::from_secs(5)).unwrap();
            halves += usize::from(pinned(&lab).iter().filter(|build| held(build) > 0).count() > 1);
            lab.start_daemon().unwrap();
            assert_eq!(pinned(&lab).len(), 1);
            assert_eq!(
                links(&lab.daemon().unwrap().status().unwrap()).len(),
                nodeguard::kernel::links::object::PROGRAMS.len()
            );
        }
        assert_eq!(knocking.join().unwrap(), 0, "a stranger was admitted");
    });
    assert_eq!(lab.healthz(Who::Peer, false).unwrap(), Outcome::Http(200));
    assert!(halves > 0, "never killed amid the links");
    println!("takeover: killed {KILLS} times at its start, {halves} of them amid the links; 0 strangers admitted");
}
