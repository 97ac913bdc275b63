//! Owns which proxy-servers this agent has a stream to, and which address it dials next: pure judgement, given the time.
//! Called by `supervisor`, which connects as this says and reports the outcome.
//! Must never keep two streams to one server for new dials, and never exceed the bounds below.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    cluster::leases::MOST_SERVERS,
    net::remote_host::{RemoteHost, ServerAddress},
};

/// The largest number of draining streams for one address.
const MOST_DRAINING: usize = 64;
/// The factor by which the wait grows after each failure.
const FACTOR: f64 = 1.5;
/// The largest random extension of a wait, so that agents do not connect all at once.
const JITTER: f64 = 0.1;

/// The waits, and whether to keep looking for servers after the advertised number is connected.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The first wait, and the wait between searches for another server behind the same address.
    pub interval: Duration,
    /// The longest wait.
    pub cap: Duration,
    /// Whether the search never ends.
    pub forever: bool,
}

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It takes new dials.
    Live,
    /// It finishes its open dials; another stream has replaced it.
    Draining,
    /// Its server already has a stream.
    Duplicate,
}

/// A stream to a server.
#[derive(Clone, Debug)]
pub(crate) struct ServerStream {
    pub(crate) role: Role,
    pub(crate) server: String,
    pub(crate) address: ServerAddress,
    /// The generation of the credentials and identifiers that it was made with; a stream of an older generation is replaced.
    pub(crate) made_with: u64,
    pub(crate) since: Instant,
    expires: Option<Instant>,
}

/// What is known about one address.
#[derive(Clone, Debug)]
pub(crate) struct AddressState {
    pub(crate) host: RemoteHost,
    /// The server that answered there last.
    seen: Option<String>,
    pub(crate) trying: bool,
    pub(crate) error: Option<String>,
    pub(crate) since: Instant,
    due: Instant,
    wait: Duration,
}

/// The outcome of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Its server had no stream.
    Added,
    /// It replaces this stream, which finishes its open dials.
    Replaced(u64),
    /// Its server already has one.
    Duplicate,
}

/// The servers, their addresses and the streams to them.
pub(crate) struct Servers {
    pace: Pace,
    pub(crate) addresses: BTreeMap<ServerAddress, AddressState>,
    pub(crate) streams: BTreeMap<u64, ServerStream>,
    /// The advertised number of servers.
    pub(crate) wanted: u32,
    /// The generation that a new stream is made with.
    current: u64,
}

impl Servers {
    /// No server is known yet.
    pub(crate) fn new(pace: Pace) -> Servers {
        Servers { pace, addresses: BTreeMap::new(), streams: BTreeMap::new(), wanted: 1, current: 0 }
    }

    /// Sets the current addresses of a host. Streams to other addresses stay until they end.
    pub(crate) fn resolved(&mut self, host: &RemoteHost, addresses: &[ServerAddress], now: Instant) {
        self.addresses.retain(|address, state| state.host != *host || addresses.contains(address));
        for address in addresses {
            self.addresses.entry(*address).or_insert_with(|| AddressState {
                host: host.clone(),
                seen: None,
                trying: false,
                error: None,
                since: now,
                due: now,
                wait: self.pace.interval,
            });
        }
    }

    /// Starts a new generation of credentials or identifiers. Addresses that failed are tried again: it may mend them.
    pub(crate) fn renew(&mut self, current: u64, now: Instant) {
        if self.current != current {
            self.current = current;
            for state in self.addresses.values_mut() {
                (state.due, state.wait) = (now, self.pace.interval);
            }
        }
    }

    /// The live streams.
    pub(crate) fn live(&self) -> impl Iterator<Item = (u64, &ServerStream)> {
        self.streams.iter().filter(|(_, held)| held.role == Role::Live).map(|(number, held)| (*number, held))
    }

    fn live_to(&self, server: &str) -> Option<u64> {
        self.live().find(|(_, held)| held.server == server).map(|(number, _)| number)
    }

    fn is_stale(&self, held: &ServerStream, now: Instant) -> bool {
        held.made_with != self.current || held.expires.is_some_and(|expires| expires <= now)
    }

    /// Live streams of an older generation whose replacement fails, each with the error.
    pub(crate) fn outdated(&self) -> impl Iterator<Item = (&ServerStream, &str)> {
        self.live().filter(|(_, held)| held.made_with != self.current).filter_map(|(_, held)| {
            let error = self.addresses.get(&held.address)?.error.as_deref()?;
            Some((held, error))
        })
    }

    /// Whether an address leads to a server that has a stream.
    pub(crate) fn is_served(&self, state: &AddressState) -> bool {
        state.seen.as_deref().is_some_and(|server| self.live_to(server).is_some())
    }

    /// Whether an address is worth dialling once its wait is over.
    fn is_wanted(&self, address: ServerAddress, state: &AddressState, now: Instant) -> bool {
        let draining = self.streams.values().filter(|held| held.role != Role::Live && held.address == address).count();
        if state.trying || draining >= MOST_DRAINING {
            return false;
        }
        let missing = !self.is_served(state);
        // A stream whose address is gone is replaced through any other address.
        let stale = self.live().any(|(_, held)| {
            self.is_stale(held, now) && (held.address == address || !self.addresses.contains_key(&held.address))
        });
        missing || stale || self.is_searching()
    }

    fn is_short(&self) -> bool {
        (self.live().count() as u64) < u64::from(self.wanted)
    }

    fn is_searching(&self) -> bool {
        self.pace.forever || self.is_short()
    }

    /// The addresses to dial now. They count as being dialled from here on.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<ServerAddress> {
        let due: Vec<ServerAddress> = self
            .addresses
            .iter()
            .filter(|(address, state)| state.due <= now && self.is_wanted(**address, state, now))
            .map(|(address, _)| *address)
            .collect();
        for address in &due {
            if let Some(state) = self.addresses.get_mut(address) {
                state.trying = true;
                state.since = now;
            }
        }
        due
    }

    /// When to ask again if nothing happens before.
    pub(crate) fn wake(&self, now: Instant) -> Option<Instant> {
        let addresses = self
            .addresses
            .iter()
            .filter(|(address, state)| self.is_wanted(**address, state, now))
            .map(|(_, state)| state.due);
        let expiries = self.live().filter_map(|(_, held)| held.expires).filter(|expires| *expires > now);
        addresses.chain(expiries).min()
    }

    /// Records that a server answered. `made_with` is the generation at the start of the attempt, `age` the age limit of the stream.
    pub(crate) fn connected(
        &mut self,
        number: u64,
        address: ServerAddress,
        server: &str,
        made_with: u64,
        age: Option<Duration>,
        now: Instant,
    ) -> Outcome {
        let before = self.live_to(server);
        let outcome = match before.and_then(|number| Some((number, self.streams.get(&number)?))) {
            Some((number, held)) if self.is_stale(held, now) && made_with >= held.made_with => {
                Outcome::Replaced(number)
            }
            Some(_) => Outcome::Duplicate,
            None if self.live().count() as u64 >= u64::from(MOST_SERVERS) => Outcome::Duplicate,
            None => Outcome::Added,
        };
        if let Outcome::Replaced(old) = outcome
            && let Some(old) = self.streams.get_mut(&old)
        {
            old.role = Role::Draining;
        }
        let role = if outcome == Outcome::Duplicate { Role::Duplicate } else { Role::Live };
        let expires = age.map(|age| now + age);
        self.streams
            .insert(number, ServerStream { role, server: server.to_owned(), address, made_with, since: now, expires });
        // If every server is connected, each further search can wait longer.
        let calm = outcome == Outcome::Duplicate && !self.is_short();
        let Pace { interval, cap, .. } = self.pace;
        if let Some(state) = self.addresses.get_mut(&address) {
            let wait = if calm { state.wait } else { interval };
            *state = AddressState {
                host: state.host.clone(),
                seen: Some(server.to_owned()),
                trying: false,
                error: None,
                since: now,
                due: now + jittered(wait),
                wait: if calm { longer(wait, cap) } else { interval },
            };
        }
        outcome
    }

    /// Records that an attempt failed.
    pub(crate) fn failed(&mut self, address: ServerAddress, error: String, now: Instant) {
        let cap = self.pace.cap;
        if let Some(state) = self.addresses.get_mut(&address) {
            state.trying = false;
            state.error = Some(error);
            state.since = now;
            state.due = now + jittered(state.wait);
            state.wait = longer(state.wait, cap);
        }
    }

    /// Records that the server of a stream is about to stop: the open dials go on, another stream takes the new ones.
    pub(crate) fn leaving(&mut self, number: u64, now: Instant) {
        let Some(held) = self.streams.get_mut(&number).filter(|held| held.role == Role::Live) else { return };
        held.role = Role::Draining;
        let (address, lived) = (held.address, now.duration_since(held.since));
        self.again(address, lived, None, now);
    }

    /// Records that a stream ended.
    pub(crate) fn ended(&mut self, number: u64, error: &str, now: Instant) {
        let Some(held) = self.streams.remove(&number) else { return };
        if held.role == Role::Live {
            self.again(held.address, now.duration_since(held.since), Some(error), now);
        }
    }

    /// Schedules the next attempt at an address that lost its stream: at once, unless the stream was too short-lived to count as a success.
    fn again(&mut self, address: ServerAddress, lived: Duration, error: Option<&str>, now: Instant) {
        let Pace { interval, cap, .. } = self.pace;
        let Some(state) = self.addresses.get_mut(&address).filter(|state| !state.trying) else { return };
        state.since = now;
        state.error = error.map(|error| format!("the stream ended: {error}"));
        if lived < interval {
            state.due = now + jittered(state.wait);
            state.wait = longer(state.wait, cap);
        } else {
            state.due = now + interval.mul_f64(JITTER * rand::random::<f64>());
            state.wait = interval;
        }
    }
}

fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(1.0 + JITTER * rand::random::<f64>())
}

fn longer(wait: Duration, cap: Duration) -> Duration {
    wait.mul_f64(FACTOR).min(cap)
}

#[cfg(test)]
#[path = "servers_tests.rs"]
mod tests;
