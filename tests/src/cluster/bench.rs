//! Owns what the guard costs a cluster: exec and logs beside the upstream agent and beside no tunnel at all, traffic between pods.
//! Called by `nodeguard-cluster bench`; client and server of pods are this program again, as `converse` and `serve`.
//! Must never carry a request of one way by another, nor compare what differs in more than the guard: same node, same minute, in turns.

use std::{
    fs::File,
    io::Write,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustls::ClientConfig;

use super::{
    Cluster,
    addresses::{at, filled, socket},
    control::{Egress, Front},
    eventually, keep_logs,
    pki::Pki,
    place::{Place, Where},
    say,
};
use crate::{
    bench::{Pairs, Row, in_turn, print, progress, round_of},
    certs::client,
    client::{TlsStream, read_until, tls_to},
    load::latency,
    process::{Process, command, run},
    sweep,
    traffic::{self, CHUNK, KINDS, NODE_CPU, OTHER_CPU, connect, fixed, in_both, listen, pin},
};

/// The ports of the API servers whose way is the upstream agent behind a proxy-server of its own, and that dial the node themselves.
const UPSTREAM: u16 = 6444;
const DIRECT: u16 = 6445;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Amount {
    /// Execs and logs by each way.
    requests: usize,
    /// Rounds of traffic between pods.
    rounds: usize,
}

/// Measures all of it and prints the rows.
pub fn bench(quick: bool) -> Result<()> {
    let amount = if quick { Amount { requests: 20, rounds: 2 } } else { Amount { requests: 200, rounds: 40 } };
    let place = Arc::new(Place::new()?);
    let mut cluster = Cluster::start(&place, &["proxy-agent.tar"])?;
    cluster.install_guard()?;
    cluster.pods(include_str!("files/bench-pods.yaml"))?;
    cluster.enforce(&filled(include_str!("files/bench-policy.yaml")))?;
    progress("the cluster stands, the guard enforces");
    match measure(&mut cluster, amount) {
        Ok(rows) => print(&rows),
        Err(error) => {
            keep_logs(&place)?;
            Err(error)
        }
    }
}

fn measure(cluster: &mut Cluster, amount: Amount) -> Result<Vec<Row>> {
    let mut rows = pods(cluster, amount)?;
    other_ways(cluster)?;
    let ways = [("guard", 6443), ("upstream agent", UPSTREAM), ("no tunnel", DIRECT)];
    let client = Client::new(&cluster.pki)?;
    rows.extend(cluster.place.run(Where::Control, || {
        for (name, port) in ways {
            eventually(&format!("exec works: {name}"), || Ok(client.exec(port).is_ok()))?;
        }
        requests(&client, ways.map(|(_, port)| port), amount)
    })?);
    cluster.check()?;
    Ok(rows)
}

/// Starts the other ways to the node. The upstream agent has as much of the machine as the guard.
fn other_ways(cluster: &mut Cluster) -> Result<()> {
    let own = Front::own(Egress::Grpc);
    cluster.control.add(Front { port: UPSTREAM, agents: Some(8232), ..own })?;
    cluster.control.add(Front { port: DIRECT, agents: None, ..own })?;
    // The one that dials itself has to be let out.
    cluster.place.let_out(10250)?;
    cluster.apply(&filled(include_str!("files/upstream-agent.yaml")))?;
    cluster.rolled_out("upstream-agent").context("the upstream agent")
}

/// A port that the policy of the bench guards, and one that it leaves alone.
const PORTS: [u16; 2] = [9_000, 9_100];

/// How long a round of each kind of traffic lasts, both sides together.
const ROUND: Duration = Duration::from_secs(1);

/// Throughput both ways, and requests with answers. Each round has processes of its own: where one stands in memory stays as it is while it
/// lasts.
fn pods(cluster: &Cluster, amount: Amount) -> Result<Vec<Row>> {
    let (server, client) = (Pod::find(cluster, "web")?, Pod::find(cluster, "bystander")?);
    let (beside, address) = (root()?.join(cluster.place.cgroup(Where::Control)), cluster.address("web")?);
    let mut pairs: [Pairs; 3] = Default::default();
    for round in 0..amount.rounds {
        let program = |pod: &Pod, what: &str| -> Result<_> {
            let mut program = command(&std::env::current_exe()?, File::open(&pod.network)?, &pod.cgroup)?;
            program.arg(what).arg(&beside);
            for port in PORTS {
                program.arg(socket(&address, port)?.to_string());
            }
            Ok(program)
        };
        let log = cluster.place.directory.join("serve.log");
        let _server = Process::start_ready("server", program(&server, "serve")?, &log)?;
        let mut converse = program(&client, "converse")?;
        converse.arg(round.to_string());
        let rates: [[f64; 2]; 3] = serde_json::from_str(&run(converse, "")?)?;
        pairs.iter_mut().zip(rates).for_each(|(pairs, rates)| pairs.add(rates));
        let ratios = rates.map(|[ours, other]| format!("{:.3}", ours / other)).join(", ");
        progress(&format!("pod to pod, round {} of {}: {ratios}", round + 1, amount.rounds));
    }
    let at_least = Some(("at least", 0.97));
    let names = [("throughput there", at_least), ("throughput back", at_least), ("requests and answers", None)];
    let rows = KINDS.iter().zip(pairs).zip(names);
    let row = |((kind, pairs), (what, goal)): ((&traffic::Kind, Pairs), _)| {
        pairs.row(format!("pod to pod: {what}, guarded | not"), kind.unit, goal)
    };
    Ok(rows.map(row).collect())
}

/// A pod on the node: what a process needs to stand in it.
struct Pod {
    network: PathBuf,
    cgroup: PathBuf,
}

impl Pod {
    fn find(cluster: &Cluster, name: &str) -> Result<Pod> {
        let uid = cluster.kubectl(&format!("get pod {name} -o jsonpath={{.metadata.uid}}")).run()?;
        let sleeps =
            |cgroups: &str, _: &Path, words: &[&str]| cgroups.contains(&uid) && words.first() == Some(&"sleep");
        let process = cluster.place.process(Where::Node, sleeps).with_context(|| name.to_owned())?;
        let cgroups = std::fs::read_to_string(process.join("cgroup"))?;
        let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).context("cgroups version 2")?;
        Ok(Pod { network: process.join("ns/net"), cgroup: root()?.join(own) })
    }
}

/// Where version 2 of cgroups is mounted.
fn root() -> Result<PathBuf> {
    sweep::hierarchies().into_iter().next().context("no cgroups")
}

/// What the client's process does: a round of each kind of traffic over two sockets, one made in its pod's cgroup, one beside it.
pub fn converse(beside: &Path, to: [SocketAddr; 2], round: usize) -> Result<()> {
    pin(OTHER_CPU)?;
    let mut sides = in_both(beside, |side| fixed(connect(to[side])?))?;
    let mut buffer = vec![0; CHUNK];
    let mut rates = Vec::new();
    for kind in &KINDS {
        rates.push(round_of(ROUND, round, |side| kind.turn(&mut sides[side], &mut buffer))?);
    }
    say(&serde_json::to_string(&rates)?)
}

/// What the server's process does.
pub fn serve(beside: &Path, at: [SocketAddr; 2]) -> Result<()> {
    pin(NODE_CPU)?;
    traffic::serve(in_both(beside, |side| fixed(listen(at[side])?))?)
}

const WHO: [&str; 2] = ["upstream agent", "no tunnel"];

/// Execs and logs by each way, in turns: guard, upstream agent, no tunnel.
fn requests(client: &Client, ports: [u16; 3], amount: Amount) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    type Ask = fn(&Client, u16) -> Result<Duration>;
    for (what, ask, goal) in
        [("exec", Client::exec as Ask, Some(("at most", 1.0))), ("logs", Client::logs as Ask, None)]
    {
        progress(&format!("{what}, {} by each way", amount.requests));
        let mut took: [Vec<Duration>; 3] = Default::default();
        for round in 0..amount.requests {
            for way in in_turn::<3>(round) {
                took[way].push(ask(client, ports[way]).with_context(|| format!("{what} at {}", ports[way]))?);
            }
        }
        let [ours, others @ ..] = took.map(latency);
        for (who, other) in WHO.into_iter().zip(others) {
            let goal = if who == WHO[0] { goal } else { None };
            rows.push(Row::beside(format!("{what} p50, guard | {who}"), "ms", ours.p50, other.p50, goal));
            rows.push(Row::beside(format!("{what} p99, guard | {who}"), "ms", ours.p99, other.p99, None));
        }
    }
    Ok(rows)
}

/// The administrator, who asks API servers. It has to be in the control plane's network namespace.
struct Client(Arc<ClientConfig>);

impl Client {
    /// Whom the cluster's certificates make it.
    fn new(pki: &Pki) -> Result<Client> {
        let (certificate, key) = (pki.path("admin.crt"), pki.path("admin.key"));
        Ok(Client(client(&pki.path("ca.crt"), Some([&certificate, &key]), None)?))
    }

    /// One exec of `true`, from the request to the word that it succeeded. The connection to the API server is there before.
    fn exec(&self, port: u16) -> Result<Duration> {
        let mut stream = self.connect(port)?;
        let started = Instant::now();
        write!(
            stream,
            "GET /api/v1/namespaces/default/pods/web/exec?container=web&command=true&stdout=true HTTP/1.1\r\nHost: lab\r\n\
        Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
        Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
        )?;
        answered(&mut stream, 101, r#""status":"Success""#)?;
        Ok(started.elapsed())
    }

    /// The last line of a log, from the request to its end.
    fn logs(&self, port: u16) -> Result<Duration> {
        let mut stream = self.connect(port)?;
        let started = Instant::now();
        write!(
            stream,
            "GET /api/v1/namespaces/default/pods/bystander/log?tailLines=1 HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"
        )?;
        answered(&mut stream, 200, "a line\n\r\n0\r\n\r\n")?;
        Ok(started.elapsed())
    }

    fn connect(&self, port: u16) -> Result<TlsStream> {
        let tcp = TcpStream::connect(socket(at().control, port)?)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut stream = tls_to(Box::new(tcp), Arc::clone(&self.0), "kubernetes")?;
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(stream)
    }
}

/// Reads an answer with this code to its end.
fn answered(stream: &mut TlsStream, code: u16, end: &str) -> Result<()> {
    let said = read_until(stream, end.as_bytes())?;
    ensure!(said.starts_with(&format!("HTTP/1.1 {code}")) && said.ends_with(end), "it answered {said}");
    Ok(())
}
