//! Owns the life of all streams: resolve, connect, serve, replace and drain as `servers` decides.
//! Called by the daemons through [`Tunnel::run`].
//! Must never cut a stream that carries dials, except when the daemon ends.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    task::{Id, JoinSet},
    time::sleep_until,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    net::remote_host::{RemoteHost, ServerAddress},
    sys::{error_chain::chain, lock::lock},
    tunnel::{
        handle::Tunnel,
        servers::Outcome,
        settings::CountSource,
        stream::{
            establish,
            establish::{Attempt, ConnectError, Stream},
            session,
            session::{Ended, Terms},
        },
    },
};

/// How often names are resolved again: there may be new servers.
const RESOLVE: Duration = Duration::from_secs(30);
/// The largest random reduction of a stream's age limit, so that agents do not reconnect all at once.
const AGE_JITTER: f64 = 0.2;

/// When a name is resolved next.
struct Lookup {
    due: Instant,
    wait: Duration,
    /// At most one look-up of a name at a time: a name server that does not answer must not accumulate waiting threads.
    under_way: bool,
}

/// The attempts, streams and look-ups in progress.
struct Supervisor<'a> {
    tunnel: &'a Tunnel,
    stop: CancellationToken,
    number: u64,
    /// The number of servers that the last new server advertised.
    responses: u32,
    attempts: JoinSet<Result<(Stream, u64), ConnectError>>,
    trying: HashMap<Id, ServerAddress>,
    sessions: JoinSet<Ended>,
    serving: HashMap<Id, u64>,
    retire: BTreeMap<u64, CancellationToken>,
    lookups: JoinSet<(RemoteHost, io::Result<Vec<ServerAddress>>)>,
    resolve: BTreeMap<RemoteHost, Lookup>,
    leaving_to: mpsc::UnboundedSender<u64>,
}

impl Tunnel {
    /// Keeps the tunnel up until `stop`; bytes that are already on their way to the servers are still sent then. After `drain` the servers are
    /// asked to send no more dials, and a stream that ends is not replaced.
    pub async fn run(&self, drain: CancellationToken, stop: CancellationToken) {
        self.credentials.load();
        tokio::select! {
            () = self.hold(drain, stop) => {}
            () = self.credentials.watch(&self.nudge) => {}
            () = async {
                match &self.leases {
                    Some(leases) => leases.watch(&self.nudge).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }

    async fn hold(&self, drain: CancellationToken, stop: CancellationToken) {
        let now = Instant::now();
        let (leaving_to, mut leaving) = mpsc::unbounded_channel();
        let lookup = || Lookup { due: now, wait: self.config.pace.interval, under_way: false };
        let mut supervisor = Supervisor {
            tunnel: self,
            stop: stop.clone(),
            number: 0,
            responses: 1,
            attempts: JoinSet::new(),
            trying: HashMap::new(),
            sessions: JoinSet::new(),
            serving: HashMap::new(),
            retire: BTreeMap::new(),
            lookups: JoinSet::new(),
            resolve: self.config.hosts.iter().map(|host| (host.clone(), lookup())).collect(),
            leaving_to,
        };
        loop {
            let wake = if drain.is_cancelled() { None } else { Some(supervisor.begin()) };
            tokio::select! {
                Some(ended) = supervisor.sessions.join_next_with_id() => {
                    let (id, ended) = match ended {
                        Ok((id, ended)) => (id, ended),
                        Err(error) => (error.id(), Ended::Crashed),
                    };
                    supervisor.ended(id, ended, drain.is_cancelled() || stop.is_cancelled());
                }
                Some(attempt) = supervisor.attempts.join_next_with_id() => match attempt {
                    Ok((id, Ok((stream, made_with)))) => supervisor.connected(id, stream, made_with),
                    Ok((id, Err(error))) => supervisor.failed(id, error.check(), chain(&error)),
                    // Aborted by a drain, or a defect.
                    Err(error) => supervisor.failed(error.id(), "attempt", "the attempt was aborted".to_owned()),
                },
                Some(Ok((host, addresses))) = supervisor.lookups.join_next() => supervisor.resolved(host, addresses),
                Some(number) = leaving.recv() => supervisor.leaving(number),
                () = self.nudge.notified() => {}
                () = async { sleep_until(wake.unwrap_or_else(Instant::now).into()).await }, if wake.is_some() => {}
                () = drain.cancelled(), if !self.draining.is_cancelled() => {
                    self.draining.cancel();
                    supervisor.attempts.abort_all();
                    supervisor.retire.values().for_each(CancellationToken::cancel);
                }
                () = stop.cancelled() => break,
            }
        }
        supervisor.attempts.shutdown().await;
        while supervisor.sessions.join_next().await.is_some() {}
    }
}

impl Supervisor<'_> {
    /// Starts what is due; returns when to look again.
    fn begin(&mut self) -> Instant {
        let (now, tunnel) = (Instant::now(), self.tunnel);
        for (host, lookup) in &mut self.resolve {
            if lookup.due <= now && !lookup.under_way {
                (lookup.due, lookup.under_way) = (now + RESOLVE, true);
                let host = host.clone();
                let number = tunnel.config.hosts.iter().position(|each| *each == host).unwrap_or_default();
                self.lookups.spawn(async move {
                    let addresses = host.resolve(number).await;
                    (host, addresses)
                });
            }
        }
        let identifiers = tunnel.identifiers.load_full();
        let made_with = tunnel.credentials.number() + identifiers.0;
        let mut servers = lock(&tunnel.servers);
        servers.renew(made_with, now);
        servers.wanted = match (&tunnel.leases, &tunnel.config.count) {
            (Some(leases), CountSource::Leases(_)) => leases.count(),
            (Some(leases), CountSource::Larger(_)) => leases.count().max(self.responses),
            (_, CountSource::Responses) | (None, _) => self.responses,
        };
        for address in servers.due(now) {
            let Some(host) = servers.addresses.get(&address).map(|state| state.host.clone()) else { continue };
            self.number += 1;
            let (config, credentials) = (Arc::clone(&tunnel.config), tunnel.credentials.current());
            let attempt = Attempt {
                number: self.number,
                host,
                address,
                agent_id: format!("{}-{}", tunnel.config.agent_id, self.number),
                identifiers: identifiers.1.to_string(),
            };
            let handle = self.attempts.spawn(async move {
                let credentials = credentials.map_err(ConnectError::Credentials)?;
                Ok((establish::connect(&config, &credentials, attempt).await?, made_with))
            });
            self.trying.insert(handle.id(), address);
        }
        let resolve = self.resolve.values().filter(|lookup| !lookup.under_way).map(|lookup| lookup.due);
        resolve.chain(servers.wake(now)).min().unwrap_or(now + RESOLVE).max(now + Duration::from_millis(1))
    }

    fn resolved(&mut self, host: RemoteHost, addresses: io::Result<Vec<ServerAddress>>) {
        let (now, pace) = (Instant::now(), self.tunnel.config.pace);
        let Some(lookup) = self.resolve.get_mut(&host) else { return };
        match addresses {
            Ok(addresses) => {
                *lookup = Lookup { due: now + RESOLVE, wait: pace.interval, under_way: false };
                lock(&self.tunnel.unresolved).remove(&host);
                lock(&self.tunnel.servers).resolved(&host, &addresses, now);
            }
            Err(error) => {
                let wait = lookup.wait;
                *lookup = Lookup { due: now + wait, wait: wait.mul_f64(1.5).min(pace.cap), under_way: false };
                let known = lock(&self.tunnel.servers).addresses.values().any(|state| state.host == host);
                tracing::error!(server = %host, %error, known, "the name of the proxy-server does not resolve; the previous addresses stay in use");
                if !known {
                    lock(&self.tunnel.unresolved).insert(host, format!("lookup: {error}"));
                }
            }
        }
    }

    fn connected(&mut self, id: Id, stream: Stream, made_with: u64) {
        let Some(address) = self.trying.remove(&id) else { return };
        let (now, tunnel, number) = (Instant::now(), self.tunnel, stream.number);
        let age = tunnel.config.max_age.map(|age| age.mul_f64(1.0 - AGE_JITTER * rand::random::<f64>()));
        let outcome = lock(&tunnel.servers).connected(number, address, &stream.server_id, made_with, age, now);
        if outcome != Outcome::Duplicate {
            self.responses = stream.server_count;
        }
        let dials = TaskTracker::new();
        lock(&tunnel.carried).insert(number, (stream.tls.clone(), dials.clone()));
        let retire = CancellationToken::new();
        match outcome {
            Outcome::Duplicate => {
                tracing::debug!(
                    server = tunnel.config.at(address),
                    server_id = stream.server_id,
                    "the server already has a stream"
                );
                // It may carry a dial already: it drains like any stream that is no longer needed.
                retire.cancel();
            }
            Outcome::Added | Outcome::Replaced(_) => tracing::info!(
                server = tunnel.config.at(address),
                server_id = stream.server_id,
                server_count = stream.server_count,
                tls = stream.tls,
                replaces = matches!(outcome, Outcome::Replaced(_)),
                "tunnel connected"
            ),
        }
        if tunnel.draining.is_cancelled() {
            retire.cancel();
        }
        if let Outcome::Replaced(old) = outcome
            && let Some(old) = self.retire.get(&old)
        {
            old.cancel();
        }
        self.retire.insert(number, retire.clone());
        let (dialer, stop, going) = (Arc::clone(&tunnel.dialer), self.stop.clone(), stream.going.clone());
        let leaving = self.leaving_to.clone();
        let handle = self.sessions.spawn(async move {
            let session = session::run(stream, dialer, Terms { drain: retire, stop, dials });
            tokio::pin!(session);
            tokio::select! {
                ended = &mut session => return ended,
                () = going.cancelled() => drop(leaving.send(number)),
            }
            session.await
        });
        self.serving.insert(handle.id(), number);
    }

    fn failed(&mut self, id: Id, check: &'static str, error: String) {
        let Some(address) = self.trying.remove(&id) else { return };
        let tunnel = self.tunnel;
        let server = tunnel.config.at(address);
        let mut servers = lock(&tunnel.servers);
        let told = servers.addresses.get(&address).is_some_and(|state| state.error.as_ref() == Some(&error));
        let alone = servers.live().next().is_none();
        if alone && !tunnel.draining.is_cancelled() {
            tracing::error!(
                server,
                check,
                error,
                "no tunnel: the control plane cannot reach this node through this server"
            );
        } else if !told {
            tracing::warn!(server, check, error, "no stream to this server; the other streams are not affected");
        }
        servers.failed(address, error, Instant::now());
        drop(servers);
        self.look_again();
    }

    /// The server of this stream is about to stop.
    fn leaving(&mut self, number: u64) {
        tracing::info!(number, "the server is about to stop: its stream is replaced and finishes its open dials");
        lock(&self.tunnel.servers).leaving(number, Instant::now());
        if let Some(retire) = self.retire.get(&number) {
            retire.cancel();
        }
        self.look_again();
    }

    fn ended(&mut self, id: Id, ended: Ended, ending: bool) {
        let Some(number) = self.serving.remove(&id) else { return };
        self.retire.remove(&number);
        lock(&self.tunnel.carried).remove(&number);
        let mut servers = lock(&self.tunnel.servers);
        let held = servers.streams.get(&number).cloned();
        let live = servers.live().any(|(live, _)| live == number);
        let reason = ended.words();
        servers.ended(number, &reason, Instant::now());
        drop(servers);
        let Some(held) = held else { return };
        let server = self.tunnel.config.at(held.address);
        match ended {
            Ended::Done => tracing::debug!(server, "a stream that was no longer needed has ended"),
            Ended::Closed | Ended::Broken(_) | Ended::Crashed if live && !ending => {
                tracing::warn!(server, server_id = held.server, reason, "tunnel lost");
            }
            Ended::Closed | Ended::Broken(_) | Ended::Crashed => {
                tracing::info!(server, reason, "a stream has ended");
            }
        }
        self.look_again();
    }

    /// Resolves the names again soon: their addresses may have changed.
    fn look_again(&mut self) {
        let soon = Instant::now() + self.tunnel.config.pace.interval;
        for (_, lookup) in self.resolve.iter_mut().filter(|(host, _)| host.at.address().is_none()) {
            lookup.due = soon.min(lookup.due);
        }
    }
}
