//! A daemon that is killed leaves nothing open, and its successor adopts what it left.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use lab::{
    client::{Outcome, knock},
    daemon::packets,
    lab::{KUBELET, Lab, POLICY},
    net::Who,
    process::until,
};
use nodeguard::report::status::Status;

const ATTEMPTS: usize = 1000;

#[test]
fn a_thousand_attempts_around_a_kill_9_and_none_admitted() {
    around_a_kill_9(Lab::new(POLICY).unwrap());
}

/// Whatever the guard of the lab may do.
pub(crate) fn around_a_kill_9(mut lab: Lab) {
    let kubelet = Who::Node.at(false, KUBELET);
    let before = lab.daemon().unwrap().status().unwrap();
    let made = AtomicUsize::new(0);
    let admitted = std::thread::scope(|scope| {
        let namespace = lab.net.open(Who::Stranger).unwrap();
        let knocking = scope.spawn(|| knock(namespace, kubelet, ATTEMPTS, &made).unwrap());
        // A third of them with the daemon, a third without, a third around its restart.
        let reached = |count: usize| {
            until("attempts", Duration::from_secs(30), || Ok(made.load(Ordering::Relaxed) >= count)).unwrap()
        };
        reached(ATTEMPTS / 3);
        lab.daemon.take().unwrap().kill().unwrap();
        reached(ATTEMPTS * 2 / 3);
        assert!(made.load(Ordering::Relaxed) < ATTEMPTS, "the attempts were over before the restart");
        lab.start_daemon().unwrap().connected().unwrap();
        knocking.join().unwrap()
    });
    assert_eq!(admitted, 0);

    let after = lab.daemon().unwrap().status().unwrap();
    let links = |status: &Status| {
        status
            .programs
            .iter()
            .map(|program| (program.name.clone(), program.link_id, program.program_id))
            .collect::<Vec<_>>()
    };
    let maps = |status: &Status| status.maps.iter().map(|map| (map.name.clone(), map.id)).collect::<Vec<_>>();
    assert_eq!(links(&before), links(&after), "links and programs are adopted");
    assert_eq!(maps(&before), maps(&after), "maps are adopted");
    assert_eq!(before.policy.epoch, after.policy.epoch, "the same policy is not brought into force again");
    let denied = packets(&after, "no-selector");
    assert!(denied >= ATTEMPTS as u64, "every attempt was denied in the kernel: {denied}");
    // The way that is meant works again, and the network was never the reason.
    assert_eq!(lab.healthz_dialled("10.0.0.2:10250").unwrap(), Outcome::Http(200));
    assert_eq!(lab.healthz(Who::Peer, false).unwrap(), Outcome::Http(200));
    println!(
        "kill -9: {ATTEMPTS} attempts, 0 admitted, {denied} packets denied; {} links and {} maps adopted",
        links(&after).len(),
        maps(&after).len()
    );
}
