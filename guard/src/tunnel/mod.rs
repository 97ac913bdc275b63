//! Owns the tunnel: one stream to every proxy-server, made anew whenever one ends or gets old.
//! Called by `app` and `agent`, which spawn [`Tunnel::run`].
//! Must never judge or dial: `session` hands each dial to `dial`.
//!
//! Reading order: `hosts` (where servers are; `http_proxy`: through which HTTP proxy) -> `material` (`tls`, `verify`: trust and identity, kept current) -> `set` (which server is
//! dialled next: judgement) -> `run` (does that) -> `connect` (one stream; `http_connect` before TLS, `batch` and `goaway` below HTTP/2) -> `session` (frames to dials
//! and back) -> `frame` (the messages). Beside it: `identifiers`, `leases` and
//! `kube` (how many servers there are).

pub mod batch;
pub mod connect;
pub mod frame;
mod goaway;
pub mod hosts;
mod http_connect;
pub mod http_proxy;
pub mod identifiers;
pub(crate) mod kube;
pub mod leases;
mod material;
mod outgoing;
mod run;
pub mod session;
mod set;
pub mod tls;
pub mod traffic;
pub mod verify;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::set::Pace;
use self::{
    hosts::{Host, Place},
    identifiers::Identifiers,
    leases::{LeaseConfig, Leases},
    material::Keeper,
    set::{Role, Set},
    tls::{Files, Manner},
};
use crate::{dial::Dialer, lock::lock};

/// How to reach the proxy-servers, and as whom.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// Where they are.
    pub hosts: Vec<Host>,
    /// Trust and identity.
    pub files: Files,
    /// How TLS is done.
    pub manner: Manner,
    /// The id of this agent; each stream adds a part of its own.
    pub agent_id: String,
    /// What the control plane may dial this agent by.
    pub identifiers: Identifiers,
    /// The waits.
    pub pace: Pace,
    /// How often an idle stream is probed.
    pub keepalive: Duration,
    /// How old a stream may become before another takes its place.
    pub max_age: Option<Duration>,
    /// Where the number of servers comes from.
    pub count: CountSource,
}

/// Where the number of servers comes from.
#[derive(Clone, Debug)]
pub enum CountSource {
    /// What the last server that was new said.
    Responses,
    /// Their leases.
    Leases(LeaseConfig),
    /// The larger of the two.
    Larger(LeaseConfig),
}

/// What `status` says about a stream, or about an address that has none.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamState {
    /// `host:port`, and the address where the host is a name.
    pub server: String,
    /// What the server calls itself.
    pub server_id: Option<String>,
    /// `connected`, `draining`, `connecting` or `waiting`.
    pub state: &'static str,
    /// RFC 3339: since when.
    pub since: String,
    /// Version and key exchange.
    pub tls: Option<String>,
    /// How many dials it carries.
    pub dials: Option<usize>,
    /// Which certificates and identifiers it was made with: a number that grows.
    pub made_with: Option<u64>,
    /// Why the last attempt or stream ended.
    pub last_error: Option<String>,
}

/// The tunnel.
pub struct Tunnel {
    config: Arc<TunnelConfig>,
    dialer: Arc<Dialer>,
    set: Mutex<Set>,
    keeper: Keeper,
    /// With a number that grows.
    identifiers: ArcSwap<(u64, Identifiers)>,
    /// TLS and dials of each stream.
    carried: Mutex<BTreeMap<u64, (String, TaskTracker)>>,
    /// Hosts that resolve to nothing, and why.
    unresolved: Mutex<BTreeMap<Host, String>>,
    draining: CancellationToken,
    nudge: Notify,
    leases: Option<Leases>,
}

impl Tunnel {
    /// A tunnel that is not connected yet.
    pub fn new(config: TunnelConfig, dialer: Arc<Dialer>) -> Arc<Tunnel> {
        let leases = match &config.count {
            CountSource::Responses => None,
            CountSource::Leases(leases) | CountSource::Larger(leases) => Some(Leases::new(leases.clone())),
        };
        Arc::new(Tunnel {
            leases,
            set: Mutex::new(Set::new(config.pace)),
            keeper: Keeper::new(config.files.clone(), config.manner.clone()),
            identifiers: ArcSwap::from_pointee((0, config.identifiers.clone())),
            carried: Mutex::default(),
            unresolved: Mutex::default(),
            draining: CancellationToken::new(),
            nudge: Notify::new(),
            config: Arc::new(config),
            dialer,
        })
    }

    /// Whether a stream is up that takes dials.
    pub fn connected(&self) -> bool {
        lock(&self.set).live().next().is_some()
    }

    /// Advertises these identifiers from now on. Every stream is replaced, and none is cut: the old ones serve what they carry.
    pub fn advertise(&self, identifiers: Identifiers) {
        let before = self.identifiers.load_full();
        if before.1 != identifiers {
            tracing::info!(%identifiers, "other identifiers: every stream is replaced");
            self.identifiers.store(Arc::new((before.0 + 1, identifiers)));
            self.nudge.notify_one();
        }
    }

    /// What weakens protection, a sentence each.
    pub fn weakened(&self) -> Vec<String> {
        let broken = self.keeper.broken().filter(|_| self.keeper.number() > 0);
        let broken = broken.map(|error| {
            format!("the certificates or the token on disk cannot be used, those from before stay in use: {error}")
        });
        let set = lock(&self.set);
        let outdated = set.outdated().map(|(held, error)| {
            format!(
                "the stream to {} was made with older certificates, token or revocation lists, and with those of now there is none: {error}",
                self.config.at(held.place)
            )
        });
        broken.into_iter().chain(outdated).collect()
    }

    /// What `status` and the metrics say.
    pub fn snapshot(&self) -> serde_json::Value {
        serde_json::json!({
            "streams": self.streams(),
            "knownServers": lock(&self.set).wanted,
            "identifiers": self.identifiers.load().1.to_string(),
            "material": { "inUse": self.keeper.number(), "failures": self.keeper.failures(), "broken": self.keeper.broken() },
            "leases": self.leases.as_ref().map(Leases::snapshot),
        })
    }

    /// Every stream, those that take dials first; then every address that should have one.
    pub fn streams(&self) -> Vec<StreamState> {
        let (set, carried) = (lock(&self.set), lock(&self.carried));
        let draining = self.draining.is_cancelled();
        let of_role = |role: Role| set.streams.iter().filter(move |(_, held)| held.role == role);
        let streams = of_role(Role::Live).chain(of_role(Role::Draining)).map(|(number, held)| {
            let (tls, dials) = carried.get(number).map(|(tls, dials)| (tls.clone(), dials.len())).unzip();
            let host = set.endpoints.get(&held.place).map(|endpoint| &endpoint.host);
            StreamState {
                server: self.config.named(host, held.place),
                server_id: Some(held.server.clone()),
                state: if held.role == Role::Draining || draining { "draining" } else { "connected" },
                since: ago(held.since),
                tls,
                dials,
                made_with: Some(held.made_with),
                last_error: None,
            }
        });
        let missing = set.endpoints.iter().filter(|(_, endpoint)| !set.is_served(endpoint)).map(|(place, endpoint)| {
            StreamState {
                server: self.config.named(Some(&endpoint.host), *place),
                state: if endpoint.trying { "connecting" } else { "waiting" },
                since: ago(endpoint.since),
                last_error: endpoint.error.clone(),
                ..StreamState::default()
            }
        });
        let unresolved = lock(&self.unresolved);
        let unresolved = unresolved.iter().map(|(host, error)| StreamState {
            server: host.to_string(),
            state: "waiting",
            since: ago(Instant::now()),
            last_error: Some(error.clone()),
            ..StreamState::default()
        });
        streams.chain(missing).chain(unresolved).collect()
    }
}

impl TunnelConfig {
    /// A place in words.
    fn at(&self, place: Place) -> String {
        match place {
            Place::Address(address) => address.to_string(),
            Place::Proxied(number) => {
                let host = self.hosts.get(number);
                let through = host.and_then(|host| Some(format!("{host} through {}", host.through.as_ref()?)));
                through.unwrap_or_default()
            }
        }
    }

    /// The same, with the name of its host.
    fn named(&self, host: Option<&Host>, place: Place) -> String {
        match (host, place) {
            (Some(host), Place::Address(address)) if host.address().is_none() => format!("{host} ({})", address.ip()),
            (Some(_) | None, Place::Address(_) | Place::Proxied(_)) => self.at(place),
        }
    }
}

/// The time of an instant, RFC 3339.
fn ago(instant: Instant) -> String {
    let elapsed = jiff::SignedDuration::try_from(instant.elapsed()).unwrap_or_default();
    jiff::Timestamp::now().checked_sub(elapsed).unwrap_or_default().to_string()
}
