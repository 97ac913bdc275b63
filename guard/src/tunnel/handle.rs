//! Owns the tunnel as others see it: whether it is connected, its streams, the identifiers that it advertises.
//! Called by the daemon, which makes it, and by `report`, which reads it.
//! Must never judge or dial: `session` hands each dial to `dial`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Instant,
};

use arc_swap::ArcSwap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    cluster::leases::{Leases, LeasesState},
    dial::serve::Dialer,
    net::remote_host::RemoteHost,
    sys::{lock::lock, times::rfc3339},
    tunnel::{
        identifiers::Identifiers,
        servers::{Role, ServerStream, Servers},
        settings::{CountSource, TunnelConfig},
        stream::credentials::CredentialStore,
    },
    wire::counts::{StreamCounts, counted},
};

/// The state of the tunnel.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TunnelState {
    /// The streams, and the addresses that should have one.
    pub streams: Vec<StreamState>,
    /// The number of servers that the agent wants a stream to.
    pub known_servers: u32,
    /// The identifiers that are advertised to the servers.
    pub identifiers: String,
    /// The certificates and the token.
    pub material: CredentialsState,
    /// Live streams that were made with older credentials and that cannot be replaced.
    pub outdated: Vec<OutdatedStream>,
    /// The leases of the servers, if they are counted.
    pub leases: Option<LeasesState>,
    /// Messages and errors of all streams.
    pub messages: StreamCounts,
}

/// A stream, or an address that should have one.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StreamState {
    /// `host:port`, and the address if the host is a name.
    pub server: String,
    /// What the server calls itself.
    pub server_id: Option<String>,
    /// What the stream does.
    pub state: StreamPhase,
    /// Since when, RFC 3339.
    pub since: String,
    /// The TLS version and the key exchange.
    pub tls: Option<String>,
    /// The number of dials that it carries.
    pub dials: Option<usize>,
    /// The number of the credentials and identifiers that it was made with; a newer set has a larger number.
    pub made_with: Option<u64>,
    /// Why the last attempt or stream ended.
    pub last_error: Option<String>,
}

/// What a stream does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StreamPhase {
    /// It takes dials.
    Connected,
    /// It serves the dials that it has and takes no more.
    Draining,
    /// An attempt to connect is under way.
    Connecting,
    /// The next attempt is due later.
    #[default]
    Waiting,
}

impl StreamPhase {
    /// All of them.
    pub const ALL: [StreamPhase; 4] =
        [StreamPhase::Connected, StreamPhase::Draining, StreamPhase::Connecting, StreamPhase::Waiting];

    /// The stable name.
    pub fn name(self) -> &'static str {
        match self {
            StreamPhase::Connected => "connected",
            StreamPhase::Draining => "draining",
            StreamPhase::Connecting => "connecting",
            StreamPhase::Waiting => "waiting",
        }
    }
}

/// The certificates and the token.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CredentialsState {
    /// The number of the set in use; 0 if there is none.
    pub in_use: u64,
    /// How often changed files could not be used.
    pub failures: u64,
    /// Why the files on disk cannot be used, if they cannot.
    pub broken: Option<String>,
}

/// A live stream that was made with older credentials and that cannot be replaced.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct OutdatedStream {
    /// The server's address.
    pub server: String,
    /// Why there is no new stream.
    pub error: String,
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

    /// The state for `status` and the metrics.
    pub fn state(&self) -> TunnelState {
        // Each lock is released before the next part takes it: a guard inside the expression below would live until its end.
        let known_servers = lock(&self.servers).wanted;
        TunnelState {
            streams: self.streams(),
            known_servers,
            identifiers: self.identifiers.load().1.to_string(),
            material: CredentialsState {
                in_use: self.credentials.number(),
                failures: self.credentials.failures(),
                broken: self.credentials.broken(),
            },
            outdated: self.outdated(),
            leases: self.leases.as_ref().map(Leases::state),
            messages: counted(),
        }
    }

    fn outdated(&self) -> Vec<OutdatedStream> {
        let servers = lock(&self.servers);
        let of = |(held, error): (&ServerStream, &str)| OutdatedStream {
            server: self.config.at(held.address),
            error: error.to_owned(),
        };
        servers.outdated().map(of).collect()
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
                state: if held.role == Role::Draining || draining {
                    StreamPhase::Draining
                } else {
                    StreamPhase::Connected
                },
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
                    state: if state.trying { StreamPhase::Connecting } else { StreamPhase::Waiting },
                    since: rfc3339(state.since),
                    last_error: state.error.clone(),
                    ..StreamState::default()
                }
            });
        let unresolved = lock(&self.unresolved);
        let unresolved = unresolved.iter().map(|(host, error)| StreamState {
            server: host.to_string(),
            state: StreamPhase::Waiting,
            since: rfc3339(Instant::now()),
            last_error: Some(error.clone()),
            ..StreamState::default()
        });
        streams.chain(missing).chain(unresolved).collect()
    }
}
