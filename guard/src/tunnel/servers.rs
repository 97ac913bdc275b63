//! Owns which proxy-servers this agent holds a stream to, and which place it dials next: judgement alone, given the time.
//! Called by `run`, which does what this says and tells what became of it.
//! Must never hold two streams to one server for new dials, and never ask for more than the bounds below.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    cluster::leases::MOST_SERVERS,
    net::hosts::{Host, Place},
};

/// How many streams that only finish what they carry one place may have.
const MOST_DRAINING: usize = 64;
/// How much the wait grows after each failure.
const FACTOR: f64 = 1.5;
/// How much longer a wait may be, so that agents do not come all at once.
const JITTER: f64 = 0.1;

/// The waits, and whether to look for servers beyond those that are said to be there.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The first wait, and the one between looks for another server behind the same place.
    pub interval: Duration,
    /// The longest.
    pub cap: Duration,
    /// Whether the search goes on for good.
    pub forever: bool,
}

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// New dials come here.
    Live,
    /// It serves what it carries; another has its place.
    Draining,
    /// Its server has a stream already.
    Duplicate,
}

/// A stream.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) role: Role,
    pub(crate) server: String,
    pub(crate) place: Place,
    /// The number of what it was made with; a stream with an old one is replaced.
    pub(crate) made_with: u64,
    pub(crate) since: Instant,
    expires: Option<Instant>,
}

/// An address, or a host behind an HTTP proxy.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    pub(crate) host: Host,
    /// The server that answered last.
    seen: Option<String>,
    pub(crate) trying: bool,
    pub(crate) error: Option<String>,
    pub(crate) since: Instant,
    due: Instant,
    wait: Duration,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A server that had none.
    Added,
    /// It takes the place of this stream, which finishes what it carries.
    Replaced(u64),
    /// Its server has one.
    Duplicate,
}

/// The set.
pub(crate) struct Set {
    pace: Pace,
    pub(crate) endpoints: BTreeMap<Place, Endpoint>,
    pub(crate) streams: BTreeMap<u64, Held>,
    /// How many servers there are said to be.
    pub(crate) wanted: u32,
    /// What a new stream is made with.
    current: u64,
}

impl Set {
    /// Nothing known.
    pub(crate) fn new(pace: Pace) -> Set {
        Set { pace, endpoints: BTreeMap::new(), streams: BTreeMap::new(), wanted: 1, current: 0 }
    }

    /// What a host stands for now. Streams to other places go on until they end.
    pub(crate) fn resolved(&mut self, host: &Host, places: &[Place], now: Instant) {
        self.endpoints.retain(|place, endpoint| endpoint.host != *host || places.contains(place));
        for place in places {
            self.endpoints.entry(*place).or_insert_with(|| Endpoint {
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

    /// New streams are made with something else from now on, which may mend what failed so far.
    pub(crate) fn renew(&mut self, current: u64, now: Instant) {
        if self.current != current {
            self.current = current;
            for endpoint in self.endpoints.values_mut() {
                (endpoint.due, endpoint.wait) = (now, self.pace.interval);
            }
        }
    }

    /// The live streams.
    pub(crate) fn live(&self) -> impl Iterator<Item = (u64, &Held)> {
        self.streams.iter().filter(|(_, held)| held.role == Role::Live).map(|(number, held)| (*number, held))
    }

    fn live_to(&self, server: &str) -> Option<u64> {
        self.live().find(|(_, held)| held.server == server).map(|(number, _)| number)
    }

    fn is_stale(&self, held: &Held, now: Instant) -> bool {
        held.made_with != self.current || held.expires.is_some_and(|expires| expires <= now)
    }

    /// Live streams that could not be replaced by one that is made with what is current, and why not.
    pub(crate) fn outdated(&self) -> impl Iterator<Item = (&Held, &str)> {
        self.live().filter(|(_, held)| held.made_with != self.current).filter_map(|(_, held)| {
            let error = self.endpoints.get(&held.place)?.error.as_deref()?;
            Some((held, error))
        })
    }

    /// Whether a place leads to a server that has a stream.
    pub(crate) fn is_served(&self, endpoint: &Endpoint) -> bool {
        endpoint.seen.as_deref().is_some_and(|server| self.live_to(server).is_some())
    }

    /// Whether a place is worth dialling, whenever that is due.
    fn is_wanted(&self, place: Place, endpoint: &Endpoint, now: Instant) -> bool {
        let draining = self.streams.values().filter(|held| held.role != Role::Live && held.place == place).count();
        if endpoint.trying || draining >= MOST_DRAINING {
            return false;
        }
        let missing = !self.is_served(endpoint);
        // A stream whose place is gone is replaced through any other.
        let stale = self.live().any(|(_, held)| {
            self.is_stale(held, now) && (held.place == place || !self.endpoints.contains_key(&held.place))
        });
        missing || stale || self.is_searching()
    }

    fn is_short(&self) -> bool {
        (self.live().count() as u64) < u64::from(self.wanted)
    }

    fn is_searching(&self) -> bool {
        self.pace.forever || self.is_short()
    }

    /// The places to dial now; they count as being dialled from here on.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<Place> {
        let due: Vec<Place> = self
            .endpoints
            .iter()
            .filter(|(place, endpoint)| endpoint.due <= now && self.is_wanted(**place, endpoint, now))
            .map(|(place, _)| *place)
            .collect();
        for place in &due {
            if let Some(endpoint) = self.endpoints.get_mut(place) {
                endpoint.trying = true;
                endpoint.since = now;
            }
        }
        due
    }

    /// When to ask again if nothing happens until then.
    pub(crate) fn wake(&self, now: Instant) -> Option<Instant> {
        let endpoints = self
            .endpoints
            .iter()
            .filter(|(place, endpoint)| self.is_wanted(**place, endpoint, now))
            .map(|(_, endpoint)| endpoint.due);
        let expiries = self.live().filter_map(|(_, held)| held.expires).filter(|expires| *expires > now);
        endpoints.chain(expiries).min()
    }

    /// A server answered. `made_with` is what was current when the attempt began, `age` how old the stream may become.
    pub(crate) fn connected(
        &mut self,
        number: u64,
        place: Place,
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
        self.streams.insert(number, Held { role, server: server.to_owned(), place, made_with, since: now, expires });
        // With every server there, a further look can wait longer each time.
        let calm = outcome == Outcome::Duplicate && !self.is_short();
        let Pace { interval, cap, .. } = self.pace;
        if let Some(endpoint) = self.endpoints.get_mut(&place) {
            let wait = if calm { endpoint.wait } else { interval };
            *endpoint = Endpoint {
                host: endpoint.host.clone(),
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

    /// An attempt came to nothing.
    pub(crate) fn failed(&mut self, place: Place, error: String, now: Instant) {
        let cap = self.pace.cap;
        if let Some(endpoint) = self.endpoints.get_mut(&place) {
            endpoint.trying = false;
            endpoint.error = Some(error);
            endpoint.since = now;
            endpoint.due = now + jittered(endpoint.wait);
            endpoint.wait = longer(endpoint.wait, cap);
        }
    }

    /// The server of this stream is about to go: what it carries goes on, another stream takes the new dials.
    pub(crate) fn leaving(&mut self, number: u64, now: Instant) {
        let Some(held) = self.streams.get_mut(&number).filter(|held| held.role == Role::Live) else { return };
        held.role = Role::Draining;
        let (place, lived) = (held.place, now.duration_since(held.since));
        self.again(place, lived, None, now);
    }

    /// A stream ended.
    pub(crate) fn ended(&mut self, number: u64, error: &str, now: Instant) {
        let Some(held) = self.streams.remove(&number) else { return };
        if held.role == Role::Live {
            self.again(held.place, now.duration_since(held.since), Some(error), now);
        }
    }

    /// The next attempt at a place that lost its stream: at once, unless the stream did not live long enough to be a success.
    fn again(&mut self, place: Place, lived: Duration, error: Option<&str>, now: Instant) {
        let Pace { interval, cap, .. } = self.pace;
        let Some(endpoint) = self.endpoints.get_mut(&place).filter(|endpoint| !endpoint.trying) else { return };
        endpoint.since = now;
        endpoint.error = error.map(|error| format!("the stream ended: {error}"));
        if lived < interval {
            endpoint.due = now + jittered(endpoint.wait);
            endpoint.wait = longer(endpoint.wait, cap);
        } else {
            endpoint.due = now + interval.mul_f64(JITTER * rand::random::<f64>());
            endpoint.wait = interval;
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
