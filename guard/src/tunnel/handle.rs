//! Owns the tunnel as others see it: whether it is connected, its streams, the identifiers that it advertises.
//! Called by the daemon, which makes it, and by `report`, which reads it.
//! Must never judge or dial: `session` hands each dial to `dial`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Instant,
};

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    cluster::leases::Leases,
    dial::serve::Dialer,
    net::remote_host::RemoteHost,
    sys::{lock::lock, times::rfc3339},
    tunnel::{
        identifiers::Identifiers,
        servers::{Role, Servers},
        settings::{CountSource, TunnelConfig},
        stream::credentials::CredentialStore,
    },
};

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
    pub(crate) config: Arc<TunnelConfig>,
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) servers: Mutex<Servers>,
    pub(crate) credentials: CredentialStore,
    /// The identifiers, with their generation number.
    pub(crate) identifiers: ArcSwap<(u64, Identifiers)>,
    /// TLS version and dials of each stream.
    pub(crate) carried: Mutex<BTreeMap<u64, (String, TaskTracker)>>,
    /// Hosts that do not resolve, and why.
    pub(crate) unresolved: Mutex<BTreeMap<RemoteHost, String>>,
    pub(crate) draining: CancellationToken,
    pub(crate) nudge: Notify,
    pub(crate) leases: Option<Leases>,
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
            servers: Mutex::new(Servers::new(config.pace)),
            credentials: CredentialStore::new(config.files.clone(), config.tls.clone()),
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
        lock(&self.servers).live().next().is_some()
    }

    /// Advertises these identifiers from now on. Every stream is replaced, and none is cut: the old ones finish their open dials.
    pub fn advertise(&self, identifiers: Identifiers) {
        let before = self.identifiers.load_full();
        if before.1 != identifiers {
            tracing::info!(%identifiers, "new identifiers: every stream is replaced");
            self.identifiers.store(Arc::new((before.0 + 1, identifiers)));
            self.nudge.notify_one();
        }
    }

    /// What weakens protection, a sentence each.
    pub fn weakened(&self) -> Vec<String> {
        let broken = self.credentials.broken().filter(|_| self.credentials.number() > 0);
        let broken = broken.map(|error| {
            format!("the certificates or the token on disk cannot be used, the previous ones stay in use: {error}")
        });
        let servers = lock(&self.servers);
        let outdated = servers.outdated().map(|(held, error)| {
            format!(
                "the stream to {} uses older certificates, token or revocation lists, because no connection succeeds with the current ones: {error}",
                self.config.at(held.address)
            )
        });
        broken.into_iter().chain(outdated).collect()
    }

    /// What `status` and the metrics say.
    pub fn snapshot(&self) -> serde_json::Value {
        serde_json::json!({
            "streams": self.streams(),
            "knownServers": lock(&self.servers).wanted,
            "identifiers": self.identifiers.load().1.to_string(),
            "material": { "inUse": self.credentials.number(), "failures": self.credentials.failures(), "broken": self.credentials.broken() },
            "leases": self.leases.as_ref().map(Leases::snapshot),
        })
    }

    /// Every stream, those that take dials first; then every address that should have one.
    pub fn streams(&self) -> Vec<StreamState> {
        let (servers, carried) = (lock(&self.servers), lock(&self.carried));
        let draining = self.draining.is_cancelled();
        let of_role = |role: Role| servers.streams.iter().filter(move |(_, held)| held.role == role);
        let streams = of_role(Role::Live).chain(of_role(Role::Draining)).map(|(number, held)| {
            let (tls, dials) = carried.get(number).map(|(tls, dials)| (tls.clone(), dials.len())).unzip();
            let host = servers.addresses.get(&held.address).map(|state| &state.host);
            StreamState {
                server: self.config.named(host, held.address),
                server_id: Some(held.server.clone()),
                state: if held.role == Role::Draining || draining { "draining" } else { "connected" },
                since: rfc3339(held.since),
                tls,
                dials,
                made_with: Some(held.made_with),
                last_error: None,
            }
        });
        let missing =
            servers.addresses.iter().filter(|(_, state)| !servers.is_served(state)).map(|(address, state)| {
                StreamState {
                    server: self.config.named(Some(&state.host), *address),
                    state: if state.trying { "connecting" } else { "waiting" },
                    since: rfc3339(state.since),
                    last_error: state.error.clone(),
                    ..StreamState::default()
                }
            });
        let unresolved = lock(&self.unresolved);
        let unresolved = unresolved.iter().map(|(host, error)| StreamState {
            server: host.to_string(),
            state: "waiting",
            since: rfc3339(Instant::now()),
            last_error: Some(error.clone()),
            ..StreamState::default()
        });
        streams.chain(missing).chain(unresolved).collect()
    }
}
