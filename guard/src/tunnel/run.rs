//! Owns doing what the set says: resolve, connect, serve, replace, drain.
//! Called by `app` and `agent` through [`Tunnel::run`].
//! Must never cut a stream that carries dials, but where the daemon ends.

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
    net::hosts::{Host, Place},
    sys::lock::lock,
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

/// How often names are resolved anew: servers may have come.
const RESOLVE: Duration = Duration::from_secs(30);
/// How far a stream's age may be from the one that was asked for, so that agents do not come all at once.
const AGE_JITTER: f64 = 0.2;

/// When a name is looked up next.
struct Lookup {
    due: Instant,
    wait: Duration,
    /// A name server that does not answer must not gather threads that wait for it.
    under_way: bool,
}

/// What is under way.
struct Run<'a> {
    tunnel: &'a Tunnel,
    stop: CancellationToken,
    number: u64,
    /// How many servers the last one that was new said there are.
    responses: u32,
    attempts: JoinSet<Result<(Stream, u64), ConnectError>>,
    trying: HashMap<Id, Place>,
    sessions: JoinSet<Ended>,
    serving: HashMap<Id, u64>,
    retire: BTreeMap<u64, CancellationToken>,
    lookups: JoinSet<(Host, io::Result<Vec<Place>>)>,
    resolve: BTreeMap<Host, Lookup>,
    leaving_to: mpsc::UnboundedSender<u64>,
}

impl Tunnel {
    /// Holds the tunnel until `stop`, when what is on its way to the servers is still sent. After `drain` the servers are asked for no
    /// more dials, and a stream that ends is not made anew.
    pub async fn run(&self, drain: CancellationToken, stop: CancellationToken) {
        self.keeper.load();
        tokio::select! {
            () = self.hold(drain, stop) => {}
            () = self.keeper.watch(&self.nudge) => {}
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
        let mut run = Run {
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
            let wake = if drain.is_cancelled() { None } else { Some(run.begin()) };
            tokio::select! {
                Some(ended) = run.sessions.join_next_with_id() => {
                    let (id, ended) = match ended {
                        Ok((id, ended)) => (id, ended),
                        Err(error) => (error.id(), Ended::Crashed),
                    };
                    run.ended(id, ended, drain.is_cancelled() || stop.is_cancelled());
                }
                Some(attempt) = run.attempts.join_next_with_id() => match attempt {
                    Ok((id, Ok((stream, made_with)))) => run.connected(id, stream, made_with),
                    Ok((id, Err(error))) => run.failed(id, error.check(), error.to_string()),
                    // Aborted by a drain, or a defect.
                    Err(error) => run.failed(error.id(), "attempt", "the attempt did not come to its end".to_owned()),
                },
                Some(Ok((host, places))) = run.lookups.join_next() => run.resolved(host, places),
                Some(number) = leaving.recv() => run.leaving(number),
                () = self.nudge.notified() => {}
                () = async { sleep_until(wake.unwrap_or_else(Instant::now).into()).await }, if wake.is_some() => {}
                () = drain.cancelled(), if !self.draining.is_cancelled() => {
                    self.draining.cancel();
                    run.attempts.abort_all();
                    run.retire.values().for_each(CancellationToken::cancel);
                }
                () = stop.cancelled() => break,
            }
        }
        run.attempts.shutdown().await;
        while run.sessions.join_next().await.is_some() {}
    }
}

impl Run<'_> {
    /// Begins what is due; when to look again.
    fn begin(&mut self) -> Instant {
        let (now, tunnel) = (Instant::now(), self.tunnel);
        for (host, lookup) in &mut self.resolve {
            if lookup.due <= now && !lookup.under_way {
                (lookup.due, lookup.under_way) = (now + RESOLVE, true);
                let host = host.clone();
                let number = tunnel.config.hosts.iter().position(|each| *each == host).unwrap_or_default();
                self.lookups.spawn(async move {
                    let places = host.resolve(number).await;
                    (host, places)
                });
            }
        }
        let identifiers = tunnel.identifiers.load_full();
        let made_with = tunnel.keeper.number() + identifiers.0;
        let mut set = lock(&tunnel.set);
        set.renew(made_with, now);
        set.wanted = match (&tunnel.leases, &tunnel.config.count) {
            (Some(leases), CountSource::Leases(_)) => leases.count(),
            (Some(leases), CountSource::Larger(_)) => leases.count().max(self.responses),
            (_, CountSource::Responses) | (None, _) => self.responses,
        };
        for place in set.due(now) {
            let Some(host) = set.endpoints.get(&place).map(|endpoint| endpoint.host.clone()) else { continue };
            self.number += 1;
            let (config, material) = (Arc::clone(&tunnel.config), tunnel.keeper.current());
            let attempt = Attempt {
                number: self.number,
                host,
                place,
                agent_id: format!("{}-{}", tunnel.config.agent_id, self.number),
                identifiers: identifiers.1.to_string(),
            };
            let handle = self.attempts.spawn(async move {
                let material = material.map_err(ConnectError::Files)?;
                Ok((establish::connect(&config, &material, attempt).await?, made_with))
            });
            self.trying.insert(handle.id(), place);
        }
        let resolve = self.resolve.values().filter(|lookup| !lookup.under_way).map(|lookup| lookup.due);
        resolve.chain(set.wake(now)).min().unwrap_or(now + RESOLVE).max(now + Duration::from_millis(1))
    }

    fn resolved(&mut self, host: Host, places: io::Result<Vec<Place>>) {
        let (now, pace) = (Instant::now(), self.tunnel.config.pace);
        let Some(lookup) = self.resolve.get_mut(&host) else { return };
        match places {
            Ok(places) => {
                *lookup = Lookup { due: now + RESOLVE, wait: pace.interval, under_way: false };
                lock(&self.tunnel.unresolved).remove(&host);
                lock(&self.tunnel.set).resolved(&host, &places, now);
            }
            Err(error) => {
                let wait = lookup.wait;
                *lookup = Lookup { due: now + wait, wait: wait.mul_f64(1.5).min(pace.cap), under_way: false };
                let known = lock(&self.tunnel.set).endpoints.values().any(|endpoint| endpoint.host == host);
                tracing::error!(server = %host, %error, known, "the name of the proxy-server does not resolve; addresses from before stay in use");
                if !known {
                    lock(&self.tunnel.unresolved).insert(host, format!("lookup: {error}"));
                }
            }
        }
    }

    fn connected(&mut self, id: Id, stream: Stream, made_with: u64) {
        let Some(place) = self.trying.remove(&id) else { return };
        let (now, tunnel, number) = (Instant::now(), self.tunnel, stream.number);
        let age = tunnel.config.max_age.map(|age| age.mul_f64(1.0 - AGE_JITTER * rand::random::<f64>()));
        let outcome = lock(&tunnel.set).connected(number, place, &stream.server_id, made_with, age, now);
        if outcome != Outcome::Duplicate {
            self.responses = stream.server_count;
        }
        let dials = TaskTracker::new();
        lock(&tunnel.carried).insert(number, (stream.tls.clone(), dials.clone()));
        let retire = CancellationToken::new();
        match outcome {
            Outcome::Duplicate => {
                tracing::debug!(
                    server = tunnel.config.at(place),
                    server_id = stream.server_id,
                    "a server that has a stream already"
                );
                // It may have got a dial already: it ends as any stream that is not needed any more.
                retire.cancel();
            }
            Outcome::Added | Outcome::Replaced(_) => tracing::info!(
                server = tunnel.config.at(place),
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
        let Some(place) = self.trying.remove(&id) else { return };
        let tunnel = self.tunnel;
        let server = tunnel.config.at(place);
        let mut set = lock(&tunnel.set);
        let told = set.endpoints.get(&place).is_some_and(|endpoint| endpoint.error.as_ref() == Some(&error));
        let alone = set.live().next().is_none();
        if alone && !tunnel.draining.is_cancelled() {
            tracing::error!(
                server,
                check,
                error,
                "no tunnel: the control plane cannot reach this node through this server"
            );
        } else if !told {
            tracing::warn!(server, check, error, "no stream to this server; the other streams go on");
        }
        set.failed(place, error, Instant::now());
        drop(set);
        self.look_again();
    }

    /// The server of this stream is about to go.
    fn leaving(&mut self, number: u64) {
        tracing::info!(number, "the server is about to go: its stream is replaced and serves what it carries");
        lock(&self.tunnel.set).leaving(number, Instant::now());
        if let Some(retire) = self.retire.get(&number) {
            retire.cancel();
        }
        self.look_again();
    }

    fn ended(&mut self, id: Id, ended: Ended, ending: bool) {
        let Some(number) = self.serving.remove(&id) else { return };
        self.retire.remove(&number);
        lock(&self.tunnel.carried).remove(&number);
        let mut set = lock(&self.tunnel.set);
        let held = set.streams.get(&number).cloned();
        let live = set.live().any(|(live, _)| live == number);
        let reason = ended.words();
        set.ended(number, &reason, Instant::now());
        drop(set);
        let Some(held) = held else { return };
        let server = self.tunnel.config.at(held.place);
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

    /// Names may mean something else by now.
    fn look_again(&mut self) {
        let soon = Instant::now() + self.tunnel.config.pace.interval;
        for (_, lookup) in self.resolve.iter_mut().filter(|(host, _)| host.address().is_none()) {
            lookup.due = soon.min(lookup.due);
        }
    }
}
