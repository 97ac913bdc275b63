//! What somebody removes or changes while the guard runs is told and mended within ten seconds, and nothing stays open.

use std::{
    fs,
    net::SocketAddr,
    sync::atomic::AtomicUsize,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData};
use guard_common::abi::{Active, PortKey, PortValue};
use lab::{
    client::{Outcome, https, knock, tcp},
    lab::{KUBELET, Lab, POLICY},
    net::Who,
    process::until,
};

const WITHIN: Duration = Duration::from_secs(10);

#[test]
fn links_pins_and_tables_that_somebody_takes_away_come_back() {
    let mut lab = Lab::new(POLICY).unwrap();
    let pins = nodeguard::kernel::load::pins(&lab.directory.join("bpf/nodeguard"));
    let map = |name: &str| Map::from_map_data(MapData::from_pin(pins.join("maps").join(name)).unwrap()).unwrap();
    let entries = || -> HashMap<MapData, PortKey, PortValue> { map("PORTS").try_into().unwrap() };
    let active = || -> Array<MapData, Active> { map("ACTIVE").try_into().unwrap() };
    let kubelet = |key: &PortKey| key.port == KUBELET;

    let maps = lab.daemon().unwrap().status().unwrap().maps;
    // Where the deed itself opens nothing, nobody may come in between it and its mending.
    let deeds: [(&str, bool, &dyn Fn()); 5] = [
        ("the pin of a link is removed", true, &|| fs::remove_file(pins.join("links/guard_ingress")).unwrap()),
        ("the pin of a map is removed", true, &|| fs::remove_file(pins.join("maps/PEERS_V4")).unwrap()),
        ("a guarded port is taken out", false, &|| {
            let mut ports = entries();
            let keys: Vec<PortKey> = ports.keys().flatten().filter(kubelet).collect();
            keys.iter().for_each(|key| ports.remove(key).unwrap());
        }),
        ("the epoch is set to another generation", false, &|| active().set(0, Active { epoch: 8 }, 0).unwrap()),
        ("everything pinned is removed", true, &|| {
            for kind in ["links", "programs", "maps"] {
                fs::read_dir(pins.join(kind))
                    .unwrap()
                    .flatten()
                    .for_each(|entry| fs::remove_file(entry.path()).unwrap());
            }
        }),
    ];
    let to = SocketAddr::new(Who::Node.v4().into(), KUBELET);
    for (number, (deed, closed, act)) in deeds.iter().enumerate() {
        let before = lab.daemon().unwrap().status().unwrap().mended;
        let made = AtomicUsize::new(0);
        let stranger = lab.net.open(Who::Stranger).unwrap();
        let daemon = lab.daemon.as_ref().unwrap();
        let took = std::thread::scope(|scope| {
            let knocking = closed.then(|| scope.spawn(|| knock(stranger, to, 1000, &made).unwrap()));
            act();
            let started = Instant::now();
            until(deed, WITHIN, || Ok(daemon.status()?.mended > before)).unwrap();
            let took = started.elapsed();
            if let Some(knocking) = knocking {
                assert_eq!(knocking.join().unwrap(), 0, "{deed}: a stranger was admitted");
            }
            took
        });
        let printed = daemon.printed();
        assert!(printed.matches("it is mended").count() > number, "{deed}: an ERROR says so\n{printed}");
        let status = daemon.status().unwrap();
        assert!(status.programs.iter().all(|program| program.attached) && status.maps == maps, "{deed}: {status:?}");
        let ca = lab.certs.path("ca.crt");
        let attempt = |who| lab.net.run(who, || Ok(https(tcp(to), "/healthz", &ca))).unwrap();
        assert_eq!((attempt(Who::Stranger), attempt(Who::Peer)), (Outcome::NoAnswer, Outcome::Http(200)), "{deed}");
        println!("drift: {deed}: mended after {took:.1?}");
    }
}
