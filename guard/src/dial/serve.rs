//! Owns a dial, from DIAL_REQ to its record: one function, one numbered phase after the other.
//! Called by `session`, which runs the future in a task for each dial.
//! Must never connect without a permit, nor leave anything of a dial behind: what ends with it is a [`Dial`].

use std::sync::Arc;

use guard_policy::{authorize::Permit, refusal::Refusal};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::{
    cluster::services::known::{Denied, Services},
    dial::{
        answer::answer,
        arrival::arrives,
        audit::recorder::{Audit, Recorder},
        backend::{BackendError, connect_backend},
        budget::Budget,
        connections::{CloseReason, Connections, Open, RefusedDial},
        failure::{Failure, LookupError},
        gate::gate,
        kubelet::check::{Certificates, CheckError},
        limits::Limits,
        queue::{Queued, queue},
        relay::{relay, reset},
        routes::{Origin, Pending, Route},
        target,
    },
    kernel::pinholes::Pinholes,
    wire::frames::{DialRequest, dial_failed, dialled},
};

/// What every dial needs.
pub struct Dialer {
    /// The register, and the ruleset that judges.
    pub connections: Arc<Connections>,
    /// The way through this node's kernel.
    pub pinholes: Arc<dyn Pinholes>,
    /// Where the record of each dial goes.
    pub audit: Arc<Audit>,
    /// The serving certificates that were checked.
    pub certificates: Certificates,
    /// Which endpoints are behind a ClusterIP.
    pub services: Services,
    /// What waits for backends, and the limits.
    pub budget: Arc<Budget>,
    /// One place for each dial that may be pending in this process.
    places: Arc<Semaphore>,
}

/// Everything that ends with a dial, wherever it is dropped. The fields are dropped in this order: first no frame finds the dial any more, then
/// its one record is written, and only then is it no longer open, because a drain ends with the last open dial.
struct Dial {
    route: Option<Route>,
    record: Recorder,
    open: Option<Open>,
    /// Until the answer.
    pending: Option<Pending>,
    /// Until the answer. `None` from the start if the process has no place.
    place: Option<OwnedSemaphorePermit>,
}

/// A dial that was answered with a connection.
struct Opened {
    dial: Dial,
    origin: Origin,
    backend: TcpStream,
    queued: Queued,
}

impl Dialer {
    /// A dialer with nothing under way.
    pub fn new(
        connections: Arc<Connections>,
        pinholes: Arc<dyn Pinholes>,
        audit: Arc<Audit>,
        limits: Limits,
        services: Services,
    ) -> Arc<Dialer> {
        let (certificates, places) = (Certificates::default(), Arc::new(Semaphore::new(limits.dials)));
        Arc::new(Dialer { connections, pinholes, audit, certificates, services, budget: Budget::new(limits), places })
    }

    /// Serves one dial to its end. The first phase runs at once, the others in the future; `None` if the first refuses the dial.
    pub fn serve(
        self: Arc<Dialer>,
        request: DialRequest,
        origin: Origin,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        // 1. Admit. A flood beyond the limit of its stream starts no task and does not wait for room on the wire.
        let mut record = self.audit.begin(&origin.server_id, &request.address);
        let limits = self.budget.limits();
        let Some(pending) = origin.pending(request.random, limits.dials_per_stream) else {
            if let Some(answer) = self.fail(&mut record, &request, &Refusal::Busy.into()) {
                let _ = origin.outbound.try_send(dial_failed(request.random, answer));
            }
            return None;
        };
        let abandoned = pending.abandoned();
        let full = self.connections.counts().open >= limits.connections as u64;
        let place = if full { None } else { Arc::clone(&self.places).try_acquire_owned().ok() };
        let mut dial = Dial { route: None, record, open: None, pending: Some(pending), place };

        // A box holds what it takes to open a dial and is dropped with the answer: most connections then rest, and their tasks stay small.
        let opening = Box::pin(async move {
            let reaching = async {
                if dial.place.is_none() {
                    return Err(Refusal::Busy.into());
                }
                let deadline = Instant::now() + self.budget.limits().dial;

                // 2. Targets. The address of a Service means its endpoints; any other address means itself.
                let (host, port) = target::parse(&request)?;
                let addresses = target::resolve(host, port, self.connections.node(), &self.services, deadline).await?;
                let ruleset = self.connections.ruleset();
                let range = ruleset.as_ref().map(|ruleset| &ruleset.services);
                let mut failure = Failure::Unresolved { host: host.to_owned(), cause: LookupError::NoSuchHost };
                let mut targets = Vec::new();
                for address in addresses {
                    match self.services.targets(address, range) {
                        Ok(behind) => targets.extend(behind),
                        Err(Denied { address, refusal, more }) => {
                            dial.record.judged(address, None);
                            failure = Failure::Refused { refusal, detail: more };
                        }
                    }
                }
                for target in targets {
                    // 3. Judge.
                    let permit = match self.connections.authorize(target.address) {
                        Ok(permit) => permit,
                        Err(refusal) => {
                            let (refusal, detail) = self.services.told(refusal, &target);
                            dial.record.judged(target.address, None);
                            failure = Failure::Refused { refusal, detail };
                            continue;
                        }
                    };
                    dial.record.judged(permit.address(), Some(permit.rule()));
                    dial.record.behind(target.service.as_ref());

                    // 4. Last hop: what the policy asks of the serving certificate holds, as of now.
                    if let Err(cause) = self.check_certificates(&permit, deadline).await {
                        failure = cause;
                        continue;
                    }

                    // 5. Reach, and make sure that what was reached is what was judged and checked.
                    let backend = match connect_backend(&*self.pinholes, &permit, deadline).await {
                        Ok(backend) => backend,
                        Err(cause) => {
                            failure = Failure::Unreachable { address: permit.address(), cause };
                            continue;
                        }
                    };
                    match arrives(&backend, &permit, &self.certificates).await {
                        Ok(()) => return Ok((permit, backend)),
                        Err(cause) => {
                            reset(&backend);
                            failure = cause;
                        }
                    }
                }
                Err(failure)
            };
            let reached = tokio::select! {
                biased;
                () = abandoned.cancelled() => Err(origin.gone()),
                reached = reaching => reached,
            };

            // 6. Register and judge again: the ruleset may have changed while the backend was dialled.
            let registered = reached.and_then(|(permit, backend)| Ok((self.connections.open(permit)?, backend)));
            let (open, backend) = match registered {
                Ok(registered) => registered,
                Err(failure) => {
                    if let Some(answer) = self.fail(&mut dial.record, &request, &failure) {
                        let _ = origin.outbound.send(dial_failed(request.random, answer)).await;
                    }
                    return None;
                }
            };
            dial.record.judged(open.permit.address(), Some(open.permit.rule()));

            // 7. Answer. The route is there before, because DATA may follow at once.
            let (id, (queue, queued)) = (open.id, queue(&self.budget, open.ending.clone()));
            dial.route = Some(origin.route(id, queue));
            dial.open = Some(open);
            if abandoned.is_cancelled() || origin.outbound.send(dialled(request.random, id)).await.is_err() {
                reset(&backend);
                self.fail(&mut dial.record, &request, &origin.gone());
                return None;
            }
            dial.answered();
            Some(Opened { dial, origin, backend, queued })
        });

        Some(async move {
            let Some(Opened { mut dial, origin, mut backend, mut queued }) = opening.await else { return };
            let Some(open) = &dial.open else { return };

            // 8. Relay both ways. Whatever ends it, there is one close reason.
            let relaying = async {
                if open.permit.demands().tls
                    && let Err(reason) = gate(&mut backend, &mut queued, &open.ending).await
                {
                    open.ending.end(reason);
                }
                relay(backend, queued, open.id, &origin.outbound, &open.ending).await
            };
            let stream_lost = async {
                origin.lost.cancelled().await;
                open.ending.end(CloseReason::TunnelLost);
                std::future::pending().await
            };
            let relayed = tokio::select! {
                relayed = relaying => relayed,
                relayed = stream_lost => relayed,
            };

            // 9. One record, which is written when the dial is dropped here.
            dial.record.closed(&relayed);
        })
    }

    /// Checks what the policy asks of the serving certificate.
    async fn check_certificates(&self, permit: &Permit, deadline: Instant) -> Result<(), Failure> {
        let address = permit.address();
        for demand in &permit.demands().certificates {
            let check = self.certificates.check(address, demand, connect_backend(&*self.pinholes, permit, deadline));
            let checked = timeout_at(deadline, check).await;
            checked.unwrap_or(Err(CheckError::Unreachable(BackendError::TimedOut))).map_err(|error| match error {
                CheckError::Unreachable(cause) => Failure::Unreachable { address, cause },
                CheckError::Refused(why) => {
                    Failure::Refused { refusal: Refusal::KubeletCertificate, detail: Some(why.words()) }
                }
            })?;
        }
        Ok(())
    }

    /// Counts and records a dial that came to nothing. Returns the answer, if anybody waits for one.
    fn fail(&self, record: &mut Recorder, request: &DialRequest, failure: &Failure) -> Option<String> {
        match failure {
            Failure::Refused { refusal, detail } => self.connections.refuse(RefusedDial {
                time: format!("{:.3}", jiff::Timestamp::now()),
                requested: record.requested().to_owned(),
                address: record.address(),
                reason: refusal.name().into(),
                message: detail.as_ref().map_or_else(|| refusal.to_string(), |detail| format!("{refusal}: {detail}")),
            }),
            Failure::Unresolved { .. } | Failure::Unreachable { .. } => self.connections.fail(failure.timed_out()),
            Failure::GaveUp | Failure::TunnelLost => {}
        }
        let answer = answer(&request.address, failure);
        record.failed(failure.outcome(), failure.reason(), answer.as_deref());
        answer
    }
}

impl Dial {
    /// The answer is out: the dial is no longer pending, and counts as admitted.
    fn answered(&mut self) {
        self.pending = None;
        self.place = None;
        self.record.opened();
    }
}

impl Origin {
    /// Why nobody waits for an answer any longer.
    fn gone(&self) -> Failure {
        if self.lost.is_cancelled() { Failure::TunnelLost } else { Failure::GaveUp }
    }
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;
