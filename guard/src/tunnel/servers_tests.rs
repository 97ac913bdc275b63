//! The choice of servers against simulated servers: at most one live stream for each server, and every server is found.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proptest::prelude::*;

use super::*;
use crate::net::host_port::HostPort;

const INTERVAL: Duration = Duration::from_millis(100);
const CAP: Duration = Duration::from_secs(1);

fn host() -> RemoteHost {
    RemoteHost { at: HostPort { name: "proxy.example".to_owned(), port: 8091 }, http_proxy: None }
}

fn address(last: u8) -> ServerAddress {
    ServerAddress::Direct(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), 8091))
}

/// Servers behind addresses, and a clock.
struct World {
    servers: Servers,
    now: Instant,
    next: u64,
    /// For each address, the servers that answer at it in turn; if there is none, nothing answers.
    behind: Vec<Vec<String>>,
    turns: Vec<usize>,
    count: u32,
    made_with: u64,
    attempts: usize,
}

impl World {
    fn new(forever: bool, behind: &[&[&str]], count: u32) -> World {
        let mut servers = Servers::new(Pace { interval: INTERVAL, cap: CAP, forever });
        let now = Instant::now();
        servers.renew(1, now);
        let addresses: Vec<ServerAddress> = (0..behind.len()).map(|last| address(last as u8)).collect();
        servers.resolved(&host(), &addresses, now);
        let behind = behind.iter().map(|servers| servers.iter().map(ToString::to_string).collect()).collect();
        World { servers, now, next: 0, behind, turns: vec![0; addresses.len()], count, made_with: 1, attempts: 0 }
    }

    /// Dials what is due, and lets time pass until something is again.
    fn step(&mut self) {
        for address in self.servers.due(self.now) {
            self.attempts += 1;
            let ServerAddress::Direct(SocketAddr::V4(v4)) = address else { continue };
            let index = usize::from(v4.ip().octets()[3]);
            let servers = &self.behind[index];
            if servers.is_empty() {
                self.servers.failed(address, "refused".to_owned(), self.now);
                continue;
            }
            let server = servers[self.turns[index] % servers.len()].clone();
            self.turns[index] += 1;
            self.next += 1;
            let outcome = self.servers.connected(self.next, address, &server, self.made_with, None, self.now);
            match outcome {
                Outcome::Duplicate => self.servers.ended(self.next, "", self.now),
                Outcome::Added | Outcome::Replaced(_) => self.servers.wanted = self.count,
            }
        }
        let limit = self.now + CAP;
        self.now =
            self.servers.wake(self.now).map_or(limit, |wake| wake.clamp(self.now, limit)) + Duration::from_millis(1);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    fn live(&self) -> Vec<String> {
        let mut live: Vec<String> = self.servers.live().map(|(_, held)| held.server.clone()).collect();
        live.sort();
        live
    }

    fn number_of(&self, server: &str) -> u64 {
        self.servers.live_to(server).unwrap()
    }
}

#[test]
fn servers_behind_one_address_are_all_found_and_then_it_is_quiet() {
    let mut world = World::new(false, &[&["a", "b", "a", "c"]], 3);
    world.run(Duration::from_secs(2));
    assert_eq!(world.live(), ["a", "b", "c"]);
    let attempts = world.attempts;
    world.run(Duration::from_secs(60));
    assert_eq!(world.attempts, attempts);
}

#[test]
fn every_address_is_dialled_whatever_the_servers_say_of_their_number() {
    let mut world = World::new(false, &[&["a"], &["b"], &["a"], &[]], 1);
    world.run(Duration::from_secs(60));
    assert_eq!(world.live(), ["a", "b"]);
    // Only the dead address is tried on, at the longest wait.
    let attempts = world.attempts;
    world.run(Duration::from_secs(60));
    assert!((50..70).contains(&(world.attempts - attempts)), "{}", world.attempts - attempts);
}

#[test]
fn a_lost_stream_is_made_anew_at_once_and_one_that_never_lived_is_not() {
    let mut world = World::new(false, &[&["a"]], 1);
    world.run(Duration::from_secs(1));
    world.servers.ended(world.number_of("a"), "reset", world.now);
    world.run(INTERVAL / 2);
    assert_eq!(world.live(), ["a"]);
    let (before, end) = (world.attempts, world.now + Duration::from_secs(20));
    while world.now < end {
        if let Some(number) = world.servers.live_to("a") {
            world.servers.ended(number, "reset", world.now);
        }
        world.step();
    }
    assert!(world.attempts - before < 40, "{} attempts in 20 s", world.attempts - before);
}

#[test]
fn a_hand_over_replaces_every_stream_and_drops_none() {
    let mut world = World::new(false, &[&["a", "b", "c"], &["d"]], 4);
    world.run(Duration::from_secs(5));
    let old: Vec<u64> = world.servers.live().map(|(number, _)| number).collect();
    (world.made_with, _) = (2, world.servers.renew(2, world.now));
    world.run(Duration::from_secs(30));
    assert_eq!(world.live(), ["a", "b", "c", "d"]);
    assert!(world.servers.live().all(|(number, held)| held.made_with == 2 && !old.contains(&number)));
    assert!(old.iter().all(|number| world.servers.streams[number].role == Role::Draining));
}

#[test]
fn a_server_that_goes_is_replaced_while_its_stream_goes_on() {
    let mut world = World::new(false, &[&["a", "b"]], 2);
    world.run(Duration::from_secs(2));
    let going = world.number_of("a");
    world.behind[0] = vec!["b".to_owned(), "c".to_owned()];
    world.servers.leaving(going, world.now);
    assert_eq!(world.servers.streams[&going].role, Role::Draining);
    world.run(Duration::from_secs(2));
    assert_eq!(world.live(), ["b", "c"]);
}

#[test]
fn an_old_stream_is_replaced_when_its_time_is_over() {
    let mut servers = Servers::new(Pace { interval: INTERVAL, cap: CAP, forever: false });
    let now = Instant::now();
    servers.resolved(&host(), &[address(0)], now);
    assert_eq!(servers.due(now), [address(0)]);
    servers.connected(1, address(0), "a", 0, Some(Duration::from_secs(60)), now);
    assert_eq!((servers.due(now + INTERVAL * 2), servers.wake(now)), (vec![], Some(now + Duration::from_secs(60))));
    let over = now + Duration::from_secs(61);
    assert_eq!(servers.due(over), [address(0)]);
    assert_eq!(servers.connected(2, address(0), "a", 0, None, over), Outcome::Replaced(1));
}

#[test]
fn a_stream_that_cannot_be_replaced_is_told() {
    let mut world = World::new(false, &[&["a"]], 1);
    world.run(Duration::from_secs(1));
    assert_eq!(world.servers.outdated().count(), 0);
    world.servers.renew(2, world.now);
    world.behind[0].clear();
    world.run(Duration::from_secs(1));
    assert_eq!(
        world.servers.outdated().map(|(held, error)| (held.server.as_str(), error)).collect::<Vec<_>>(),
        [("a", "refused")]
    );
    world.behind[0].push("a".to_owned());
    world.made_with = 2;
    world.run(CAP * 2);
    assert_eq!(world.servers.outdated().count(), 0);
}

#[test]
fn streams_that_cannot_end_are_bounded() {
    let mut world = World::new(false, &[&["a"]], 1);
    for _ in 0..MOST_DRAINING * 3 {
        world.run(INTERVAL * 2);
        if let Some(number) = world.servers.live_to("a") {
            world.servers.leaving(number, world.now);
        }
    }
    assert!(world.servers.streams.len() <= MOST_DRAINING + 1, "{}", world.servers.streams.len());
}

#[test]
fn a_search_for_good_slows_down_when_all_are_there() {
    let mut world = World::new(true, &[&["a", "b"]], 2);
    world.run(Duration::from_secs(60));
    assert!((55..80).contains(&world.attempts), "{}", world.attempts);
    world.behind[0].push("c".to_owned());
    world.run(CAP * 5);
    assert_eq!(world.live(), ["a", "b", "c"]);
}

#[derive(Clone, Debug)]
enum Event {
    Step,
    End(usize),
    Leave(usize),
    Renew,
    Expire,
    Resolve(Vec<u8>),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => Just(Event::Step),
        1 => (0usize..8).prop_map(Event::End),
        1 => (0usize..8).prop_map(Event::Leave),
        1 => Just(Event::Renew),
        1 => Just(Event::Expire),
        1 => prop::collection::vec(0u8..3, 1..4).prop_map(Event::Resolve),
    ]
}

proptest! {
    #[test]
    fn a_server_never_has_two_live_streams_and_all_are_found_in_the_end(
        events in prop::collection::vec(event(), 0..60),
        forever in any::<bool>(),
    ) {
        let mut world = World::new(forever, &[&["a", "b"], &["b", "c"], &["d"]], 4);
        for event in events {
            let pick = |world: &World, index: usize| world.servers.streams.keys().nth(index).copied();
            match event {
                Event::Step => world.step(),
                Event::End(index) => if let Some(number) = pick(&world, index) {
                    world.servers.ended(number, "", world.now);
                },
                Event::Leave(index) => if let Some(number) = pick(&world, index) {
                    world.servers.leaving(number, world.now);
                },
                Event::Renew => {
                    world.made_with += 1;
                    world.servers.renew(world.made_with, world.now);
                }
                Event::Expire => world.now += Duration::from_secs(5),
                Event::Resolve(addresses) => {
                    let addresses: Vec<ServerAddress> = addresses.into_iter().map(address).collect();
                    world.servers.resolved(&host(), &addresses, world.now);
                }
            }
            let mut live = world.live();
            live.dedup();
            prop_assert_eq!(live.len(), world.servers.live().count());
        }
        world.servers.resolved(&host(), &[address(0), address(1), address(2)], world.now);
        world.run(Duration::from_secs(60));
        prop_assert_eq!(world.live(), ["a", "b", "c", "d"]);
        prop_assert!(world.servers.live().all(|(_, held)| held.made_with == world.made_with));
    }
}
