//! Owns the tests of a dial's walk: how each phase ends it, and that nothing of it is left however and wherever it ends.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::Poll,
    time::Duration,
};

use aya::maps::MapError;
use guard_policy::{compile::compile, diagnostic::Source, node_facts::NodeFacts};
use proptest::prelude::*;
use tokio::{io::AsyncWriteExt, net::TcpListener, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    kernel::pinholes::PinholeError,
    wire::frames::{Packet, Payload},
};

const DIAL: Duration = Duration::from_millis(30);
const RANDOM: i64 = 4;

/// A kernel half that counts, and that is full if asked to be.
#[derive(Default)]
struct FakePinholes {
    full: bool,
    registered: AtomicU64,
    forgotten: AtomicU64,
}

impl Pinholes for FakePinholes {
    fn register(&self, cookie: u64) -> Result<(), PinholeError> {
        if self.full {
            return Err(PinholeError { cookie, source: MapError::ElementNotFound });
        }
        self.registered.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn forget(&self, _cookie: u64) {
        self.forgotten.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a dial meets on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Protocol,
    Malformed,
    Unnamed,
    NoSuchHost,
    StreamLimit,
    ProcessLimit,
    TooManyOpen,
    NoPinhole,
    RefusedByBackend,
    DeafBackend,
    Open,
}

const WAYS: [Way; 11] = [
    Way::Protocol,
    Way::Malformed,
    Way::Unnamed,
    Way::NoSuchHost,
    Way::StreamLimit,
    Way::ProcessLimit,
    Way::TooManyOpen,
    Way::NoPinhole,
    Way::RefusedByBackend,
    Way::DeafBackend,
    Way::Open,
];

/// Who ends it, if nothing does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Nobody,
    ControlPlaneGivesUp,
    ControlPlaneCloses,
    StreamLost,
    WireGone,
    PolicyGone,
    BackendCloses,
    TaskDropped,
}

const ENDS: [End; 8] = [
    End::Nobody,
    End::ControlPlaneGivesUp,
    End::ControlPlaneCloses,
    End::StreamLost,
    End::WireGone,
    End::PolicyGone,
    End::BackendCloses,
    End::TaskDropped,
];

struct Rig {
    dialer: Arc<Dialer>,
    pinholes: Arc<FakePinholes>,
    origin: Origin,
    wire: Option<mpsc::Receiver<Packet>>,
    request: DialRequest,
    limits: Limits,
    listener: Option<TcpListener>,
    /// Connections that fill the backlog of a backend that accepts nothing.
    _backlog: Vec<std::net::TcpStream>,
}

/// A listener whose backlog is full: the kernel answers no further SYN.
fn deaf() -> (TcpListener, Vec<std::net::TcpStream>) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(20));
    let backlog = std::iter::from_fn(|| connect().ok()).collect();
    (TcpListener::from_std(listener).unwrap(), backlog)
}

impl Rig {
    async fn new(way: Way) -> Rig {
        let default = Limits::default();
        let limits = Limits {
            dial: DIAL,
            dials_per_stream: if way == Way::StreamLimit { 0 } else { default.dials_per_stream },
            dials: if way == Way::ProcessLimit { 0 } else { default.dials },
            connections: if way == Way::TooManyOpen { 0 } else { default.connections },
            ..default
        };
        let (listener, backlog) = if way == Way::DeafBackend {
            deaf()
        } else {
            (TcpListener::bind("127.0.0.1:0").await.unwrap(), Vec::new())
        };
        let address = match way {
            Way::Malformed => "127.0.0.1".to_owned(),
            Way::Unnamed => "127.0.0.2:80".to_owned(),
            // The node's own name, and the node has no address: no resolver is asked.
            Way::NoSuchHost => "node-1:80".to_owned(),
            Way::Protocol
            | Way::StreamLimit
            | Way::ProcessLimit
            | Way::TooManyOpen
            | Way::NoPinhole
            | Way::RefusedByBackend
            | Way::DeafBackend
            | Way::Open => listener.local_addr().unwrap().to_string(),
        };
        let protocol = if way == Way::Protocol { "udp" } else { "tcp" };
        let listener = (way != Way::RefusedByBackend).then_some(listener);
        let text = "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {name: t}\nspec: {mode: Enforce, guard: [], \
                    tunnel: {dial: [pods: {cidrs: [127.0.0.1/32], ports: [1-65535]}]}}\n";
        let ruleset = compile(&Source { path: "t".into(), text: text.to_owned() }, &NodeFacts::default()).unwrap().0;
        let connections = Connections::new(NodeFacts { names: vec!["node-1".to_owned()], ..NodeFacts::default() });
        connections.publish(Some(Arc::new(ruleset)));
        let pinholes = Arc::new(FakePinholes { full: way == Way::NoPinhole, ..FakePinholes::default() });
        let dialer = Dialer::new(
            connections,
            Arc::clone(&pinholes) as Arc<dyn Pinholes>,
            Audit::new(None),
            limits,
            Services::unwatched(),
        );
        let (outbound, wire) = mpsc::channel(4);
        let origin = Origin { outbound, server_id: "s".into(), lost: CancellationToken::new(), routes: Arc::default() };
        let request = DialRequest { protocol: protocol.to_owned(), address, random: RANDOM };
        Rig { dialer, pinholes, origin, wire: Some(wire), request, limits, listener, _backlog: backlog }
    }

    fn serve(&self) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        let dial = Arc::clone(&self.dialer).serve(self.request.clone(), self.origin.clone())?;
        Some(Box::pin(dial))
    }

    /// Nothing of the dial is left but one record.
    fn assert_nothing_left(&self) {
        let totals = self.dialer.audit.totals();
        assert_eq!(totals.records, 1, "records");
        assert_eq!(totals.dials.iter().map(|count| count.count).sum::<u64>(), 1, "outcomes: {:?}", totals.dials);
        assert_eq!(self.origin.routes.len(), (0, 0), "routes and pending dials");
        assert_eq!(self.dialer.connections.counts().open, 0, "the register");
        assert_eq!(self.dialer.places.available_permits(), self.limits.dials, "places of the process");
        assert_eq!(self.dialer.budget.used().0, 0, "waiting bytes");
        let admitted = totals.outcome("admitted");
        let (registered, forgotten) =
            (self.pinholes.registered.load(Ordering::Relaxed), self.pinholes.forgotten.load(Ordering::Relaxed));
        assert!(forgotten <= registered && registered <= 1 && registered + forgotten >= admitted, "pinholes");
    }

    async fn end(&mut self, end: End, dial: &mut Option<Pin<Box<dyn Future<Output = ()> + Send>>>) {
        match end {
            End::Nobody => {}
            End::ControlPlaneGivesUp => self.origin.routes.abandon(RANDOM),
            End::ControlPlaneCloses => {
                // It can only close what it was told of.
                let answer = self.wire.as_mut().and_then(|wire| wire.try_recv().ok());
                if let Some(Payload::DialResponse(answer)) = answer.and_then(|packet| packet.payload)
                    && let Some(queue) = self.origin.routes.remove(answer.connect_id)
                {
                    queue.close();
                }
            }
            End::StreamLost => self.origin.lost.cancel(),
            End::WireGone => drop(self.wire.take()),
            End::PolicyGone => drop(self.dialer.connections.publish(None)),
            End::BackendCloses => {
                if let Some(listener) = self.listener.take()
                    && let Ok(Ok((mut backend, _))) = timeout(Duration::from_millis(1), listener.accept()).await
                {
                    backend.write_all(b"bye").await.unwrap();
                }
            }
            End::TaskDropped => *dial = None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn nothing_of_a_dial_is_left_wherever_and_however_it_ends(
        way in prop::sample::select(&WAYS[..]),
        end in prop::sample::select(&ENDS[..]),
        polls in 0..6usize,
        full_wire: bool,
    ) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let mut rig = Rig::new(way).await;
            if full_wire {
                while rig.origin.outbound.try_send(Packet::default()).is_ok() {}
            }
            let mut dial = rig.serve();
            for _ in 0..polls {
                let Some(running) = &mut dial else { break };
                let over = std::future::poll_fn(|context| Poll::Ready(running.as_mut().poll(context).is_ready())).await;
                if over {
                    dial = None;
                }
                tokio::task::yield_now().await;
            }
            rig.end(end, &mut dial).await;
            if let Some(mut running) = dial
                && timeout(2 * DIAL, &mut running).await.is_err()
            {
                // Nobody ended it, or the wire is full: a stream that is lost ends every dial.
                rig.origin.lost.cancel();
                rig.wire = None;
                timeout(Duration::from_secs(5), running).await.expect("a dial outlives its stream");
            }
            rig.assert_nothing_left();
        });
    }
}

#[tokio::test]
async fn each_phase_that_fails_has_its_outcome_and_one_answer() {
    for (way, outcome, reason, answer) in [
        (Way::StreamLimit, "refused", "busy", "accepts no more dials"),
        (Way::ProcessLimit, "refused", "busy", "accepts no more dials"),
        (Way::TooManyOpen, "refused", "busy", "accepts no more dials"),
        (Way::Protocol, "refused", "protocol", "only TCP"),
        (Way::Malformed, "refused", "malformed", "not host:port"),
        (Way::Unnamed, "refused", "loopback", "loopback addresses are not dialled"),
        (Way::NoSuchHost, "failed", "no-such-host", "lookup node-1: no such host"),
        (Way::NoPinhole, "failed", "other", "connect: no pinhole in the kernel: element not found"),
        (Way::RefusedByBackend, "failed", "connection-refused", "connect: connection refused"),
        (Way::DeafBackend, "failed", "timeout", "i/o timeout"),
    ] {
        let mut rig = Rig::new(way).await;
        if let Some(dial) = rig.serve() {
            dial.await;
        }
        let mut wire = rig.wire.take().unwrap();
        let told = match wire.try_recv().unwrap().payload {
            Some(Payload::DialResponse(response)) => response,
            other => panic!("{way:?}: {other:?}"),
        };
        assert_eq!((told.random, told.connect_id), (RANDOM, 0), "{way:?}");
        assert!(told.error.contains(answer), "{way:?}: {}", told.error);
        assert!(wire.try_recv().is_err(), "{way:?}: one answer");
        assert_eq!(rig.dialer.audit.totals().count(outcome, reason), 1, "{way:?}");
        rig.assert_nothing_left();
    }
}

#[tokio::test]
async fn the_record_is_written_before_the_answer_goes_out() {
    let rig = Rig::new(Way::Malformed).await;
    while rig.origin.outbound.try_send(Packet::default()).is_ok() {}
    let mut dial = rig.serve().unwrap();
    assert!(timeout(DIAL, &mut dial).await.is_err(), "the wire is full");
    assert_eq!(rig.dialer.audit.totals().records, 1);
    assert_eq!(rig.origin.routes.len(), (0, 1), "a dial that waits for the wire is pending");
}

#[tokio::test]
async fn an_open_dial_is_one_in_every_place_until_it_ends() {
    let rig = Rig::new(Way::Open).await;
    let mut dial = rig.serve().unwrap();
    assert_eq!(rig.origin.routes.len(), (0, 1));
    assert!(timeout(DIAL, &mut dial).await.is_err());
    assert_eq!(rig.origin.routes.len(), (1, 0));
    assert_eq!(rig.dialer.connections.counts().open, 1);
    assert_eq!(rig.dialer.places.available_permits(), rig.limits.dials);
    assert_eq!(rig.dialer.audit.totals().records, 0);
    // Its end comes from outside, and its reason stands in the record.
    rig.dialer.connections.end_all(CloseReason::Drained);
    dial.await;
    assert_eq!(rig.dialer.audit.totals().closes("drained"), 1);
    rig.assert_nothing_left();
}

#[tokio::test]
async fn dials_of_one_random_are_abandoned_together_and_count_until_they_have_ended() {
    let rig = Rig::new(Way::DeafBackend).await;
    let (first, second) = (rig.serve().unwrap(), rig.serve().unwrap());
    rig.origin.routes.abandon(RANDOM);
    assert_eq!(rig.origin.routes.len(), (0, 2));
    first.await;
    assert_eq!(rig.origin.routes.len(), (0, 1));
    second.await;
    assert_eq!(rig.origin.routes.len(), (0, 0));
    assert_eq!(rig.dialer.audit.totals().count("abandoned", "control-plane-gave-up"), 2);
}

#[tokio::test]
async fn the_task_of_a_resting_connection_is_small() {
    let rig = Rig::new(Way::Open).await;
    let dial = Arc::clone(&rig.dialer).serve(rig.request.clone(), rig.origin.clone()).unwrap();
    assert!(size_of_val(&dial) <= LARGEST_TASK, "{} bytes", size_of_val(&dial));
}

/// What a connection may cost while it rests, bytes.
const LARGEST_TASK: usize = 2048;
