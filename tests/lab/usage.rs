//! How full the maps are and how long the programs ran: in `status` and as metrics, and told before a map is full.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::atomic::AtomicUsize,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use guard_common::abi::{Asked, AskedKey, MAX_COOKIES, Pinhole};
use lab::{
    client::knock,
    lab::{KUBELET, Lab, POLICY},
    net::Who,
    process::until,
};
use nodeguard::kernel::observe::map_use::MapUse;

const WITHIN: Duration = Duration::from_secs(10);

#[test]
fn maps_are_counted_and_programs_measured() {
    let mut lab = Lab::bare().unwrap();
    lab.write_policy(POLICY).unwrap();
    lab.setup.options = vec!["--program-stats"];
    lab.start_daemon().unwrap();
    let stranger = lab.net.open(Who::Stranger).unwrap();
    let to = Who::Node.at(false, KUBELET);
    assert_eq!(knock(stranger, to, 100, &AtomicUsize::new(0)).unwrap(), 0);
    let daemon = lab.daemon.as_ref().unwrap();
    let status = daemon.status().unwrap();
    let of = |maps: &[MapUse], name: &str| maps.iter().find(|map| map.name == name).cloned().unwrap();
    // 10.0.0.2, fd00::2 and the pod's side of the node, and the pods' prefixes; two peers with an exception in each family. The pod's port
    // is there once more for pods whose addresses are not known.
    assert_eq!((of(&status.map_use, "PORTS").entries, of(&status.map_use, "RULE_NAMES").entries), (3, 2));
    assert_eq!((of(&status.map_use, "PEERS_V4").entries, of(&status.map_use, "PEERS_V6").entries), (2, 2));
    assert_eq!(of(&status.map_use, "PEERS_V4").capacity, u64::from(guard_common::abi::MAX_PEERS) / 2);
    assert!(of(&status.map_use, "SCOPES").entries >= 4, "{:?}", status.map_use);
    assert!(!status.weakened.iter().any(|weakness| weakness.message.contains("the map")), "{:?}", status.weakened);
    let ran = status.program_use.iter().find(|program| program.name == "guard_ingress").unwrap();
    assert!(ran.runs >= 100 && ran.seconds > 0.0 && ran.seconds < 1.0, "{ran:?}");
    let each = ran.seconds * 1e9 / ran.runs as f64;
    println!("usage: guard_ingress ran {} times, {each:.0} ns each", ran.runs);

    // Somebody fills a table, in more than one batch.
    let pins = lab.pins();
    let map = |name: &str| Map::from_map_data(MapData::from_pin(pins.join("maps").join(name)).unwrap()).unwrap();
    let mut cookies: HashMap<_, u64, Pinhole> = map("COOKIES").try_into().unwrap();
    let nearly = u64::from(MAX_COOKIES) * 92 / 100;
    (0..nearly).for_each(|cookie| cookies.insert(1 << 60 | cookie, Pinhole::of(Pinhole::TUNNEL), 0).unwrap());
    // What was asked too long ago does not count.
    let mut asked: HashMap<_, AskedKey, Asked> = map("ASKED").try_into().unwrap();
    for port in 0..100u16 {
        let key = AskedKey { port: port.to_be_bytes(), ..AskedKey::default() };
        asked.insert(key, Asked { at: if port < 60 { 0 } else { now() } }, 0).unwrap();
    }
    let counted = |name: &str| of(&daemon.status().unwrap().map_use, name).entries;
    until("the cookies are counted", WITHIN, || Ok(counted("COOKIES") == nearly)).unwrap();
    assert_eq!(counted("ASKED"), 40);
    let status = daemon.status().unwrap();
    assert!(status.weakened.iter().any(|weakness| weakness.message.contains("COOKIES is 9")), "{:?}", status.weakened);
    let text = daemon.said("status", &[]).unwrap().text();
    assert!(text.contains("\nMAP ") && text.contains("COOKIES") && text.contains("guard_ingress"), "{text}");
    let scrape = || {
        let mut stream = TcpStream::connect("127.0.0.1:8093")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let metrics = lab.net.run(Who::Node, scrape).unwrap();
    for line in [
        format!("nodeguard_map_entries{{map=\"COOKIES\"}} {nearly}\n"),
        format!("nodeguard_map_capacity{{map=\"COOKIES\"}} {MAX_COOKIES}\n"),
        "nodeguard_program_runs_total{program=\"guard_ingress\"} ".to_owned(),
        "nodeguard_program_seconds_total{program=\"guard_ingress\"} 0.0".to_owned(),
    ] {
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
}

/// Seconds of `CLOCK_MONOTONIC`.
fn now() -> u32 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap().tv_sec() as u32
}
