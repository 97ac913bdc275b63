//! Connections that are open when a rule is withdrawn, or when the guard starts: cut if they are no longer admitted, else left alone.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    process::Stdio,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use lab::{
    client::{Outcome, https, knock, through, timed_out},
    lab::{KUBELET, Lab, POD_PORTS, POLICY},
    main_job::with_node_selector,
    net::Who,
    process::until,
};

const WITHIN: Duration = Duration::from_secs(1);

/// A connection that says nothing and stays.
pub(crate) fn hold(lab: &Lab, who: Who, to: SocketAddr) -> TcpStream {
    let stream = lab.net.run(who, || Ok(TcpStream::connect_timeout(&to, Duration::from_secs(2))?)).unwrap();
    stream.set_read_timeout(Some(WITHIN)).unwrap();
    stream
}

/// Whether the other end has gone, waiting for it at most a second.
pub(crate) fn is_cut(mut stream: &TcpStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(0) => true,
        Ok(_) => panic!("nobody speaks first here"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
        Err(error) if timed_out(&error) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_an_edit_withdraws_is_cut_and_nothing_else() {
    let tight = with_node_selector();
    // Both peers may reach kubelet, over both families, and everybody the pod.
    let loose = tight
        .replace(", except: [10.0.8.66/32]", "")
        .replace(", except: ['fd00:8::66/128']", "")
        .replace("ports: [8080]}\n      allow:\n", "ports: [8080]}\n      allow:\n        - ipBlock: {cidr: 10.0.0.0/16}\n        - ipBlock: {cidr: 'fd00::/16'}\n");
    assert_eq!(loose.matches("ipBlock").count(), 4);
    let mut lab = Lab::new(&loose).unwrap();
    let (mut withdrawn, mut kept) = (Vec::new(), Vec::new());
    for v6 in [false, true] {
        let kubelet = Who::Node.at(v6, KUBELET);
        let [guarded, open] = POD_PORTS.map(|port| Who::Pod.at(v6, port));
        withdrawn.push(("excepted -> kubelet", hold(&lab, Who::Excepted, kubelet)));
        withdrawn.push(("stranger -> guarded pod port", hold(&lab, Who::Stranger, guarded)));
        kept.push(("peer -> kubelet", hold(&lab, Who::Peer, kubelet)));
        kept.push(("stranger -> open pod port", hold(&lab, Who::Stranger, open)));
    }
    kept.push(("node -> kubelet, allowed as `node`", hold_inside(&lab)));
    let mut dialled =
        through(lab.server().unwrap(), "10.0.0.2:7001").map_err(|outcome| format!("{outcome:?}")).unwrap();
    let mut to_kubelet =
        through(lab.server().unwrap(), "10.0.0.2:10250").map_err(|outcome| format!("{outcome:?}")).unwrap();
    // In the middle of a TLS record: a server that is told more waits for the rest.
    to_kubelet.write_all(b"\x16\x03").unwrap();

    let before = lab.daemon().unwrap().status().unwrap();
    let made = AtomicUsize::new(0);
    let stranger = lab.net.open(Who::Stranger).unwrap();
    std::thread::scope(|scope| {
        let knocking = scope.spawn(|| knock(stranger, Who::Node.at(false, KUBELET), 1000, &made).unwrap());
        lab.write_policy(&tight).unwrap();
        let written = Instant::now();
        for (what, stream) in &withdrawn {
            assert!(is_cut(stream), "{what} goes on");
        }
        let took = written.elapsed();
        assert!(took <= WITHIN, "{took:?}");
        println!("established: {} withdrawn connections cut within {took:.0?}", withdrawn.len());
        assert_eq!(knocking.join().unwrap(), 0, "a stranger was admitted meanwhile");
    });
    for (what, stream) in &kept {
        assert!(!is_cut(stream), "{what} was cut");
    }
    dialled.write_all(b"GET 4 1\n").unwrap();
    let mut got = Vec::new();
    dialled.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), 4, "a dial to a port that nobody guards goes on");
    let daemon = lab.daemon().unwrap();
    let status = daemon.status().unwrap();
    assert_eq!(status.cut - before.cut, withdrawn.len() as u64);
    assert_eq!(status.dials.map(|dials| dials.open), Some(1), "the dial to kubelet is still open");
    assert_eq!(daemon.printed().matches("connection cut").count(), withdrawn.len());
    println!("established: {} others undisturbed", kept.len() + 2);
}

/// A connection of the node to its own kubelet, made in the guarded cgroup. The helper's end stays open as long as the lab does.
fn hold_inside(lab: &Lab) -> TcpStream {
    let mut helper = lab.helper(Who::Node, "", &["relay", "127.0.0.1:10250", "[::]:7002"]).unwrap();
    helper.stdout(Stdio::null()).stderr(Stdio::null());
    drop(helper.spawn().unwrap());
    let to = Who::Node.at(false, 7002);
    let mut stream = None;
    until("the helper", Duration::from_secs(5), || {
        stream = lab.net.run(Who::Peer, || Ok(TcpStream::connect_timeout(&to, Duration::from_secs(1))?)).ok();
        Ok(stream.is_some())
    })
    .unwrap();
    let stream = stream.unwrap();
    stream.set_read_timeout(Some(WITHIN)).unwrap();
    // Its other half is connected by now, or this one would be closed.
    assert!(!is_cut(&stream));
    stream
}

#[test]
fn what_was_open_before_the_guard_is_judged_when_it_starts() {
    let mut lab = Lab::new(&with_node_selector()).unwrap();
    lab.daemon().unwrap().process.stop().unwrap();
    lab.daemon().unwrap().said("unpin", &[]).unwrap();
    let kubelet = Who::Node.at(false, KUBELET);
    let (stranger, peer) = (hold(&lab, Who::Stranger, kubelet), hold(&lab, Who::Peer, kubelet));
    lab.start_daemon().unwrap();
    assert!(is_cut(&stranger), "the stranger goes on");
    assert!(!is_cut(&peer), "the peer was cut");
}

#[test]
fn edits_in_a_row_disturb_no_dial_that_stays_allowed() {
    const EDITS: usize = 40;
    let mut lab = Lab::new(POLICY).unwrap();
    let ca = lab.certs.path("ca.crt");
    let ended = AtomicBool::new(false);
    let requests = std::thread::scope(|scope| {
        let server = lab.server().unwrap();
        let asking = ["10.0.0.2:10250", "[fd00::2]:10250"].map(|to| {
            let (ended, ca) = (&ended, &ca);
            scope.spawn(move || {
                let mut requests = 0;
                while !ended.load(Ordering::Relaxed) {
                    assert_eq!(https(through(server, to), "/healthz", ca), Outcome::Http(200), "{to}");
                    requests += 1;
                }
                requests
            })
        });
        for number in 0..EDITS {
            lab.write_policy(&POLICY.replace("10.0.8.66/32", &format!("10.0.8.{}/32", 100 + number))).unwrap();
            std::thread::sleep(Duration::from_millis(40));
        }
        ended.store(true, Ordering::Relaxed);
        asking.map(|asking| asking.join().unwrap()).iter().sum::<usize>()
    });
    let status = lab.daemon().unwrap().status().unwrap();
    assert!(status.policy.epoch as usize > EDITS / 2, "the edits came into force: epoch {}", status.policy.epoch);
    assert_eq!(status.cut, 0);
    println!("established: {requests} requests through the tunnel during {EDITS} edits, none disturbed");
}
