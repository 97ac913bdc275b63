//! Owns asking API servers for execs and logs, as kubectl does, but without starting kubectl: that takes longer than what is measured.
//! Called by the bench.
//! Must never count a request that was not answered in full.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};

use super::Amount;
use crate::{
    bench::{Row, in_turn, progress},
    client::Stream,
    cluster::{
        addresses::{at, socket},
        pki::Pki,
    },
    load::latency,
    servers::tls::client,
};

const WHO: [&str; 2] = ["upstream agent", "no tunnel"];

/// Execs and logs by each way, in turns: guard, upstream agent, no tunnel.
pub(super) fn measure(client: &Client, ports: [u16; 3], amount: Amount) -> Result<Vec<Row>> {
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
pub(super) struct Client(Arc<ClientConfig>);

impl Client {
    /// Whom the cluster's certificates make it.
    pub(super) fn new(pki: &Pki) -> Result<Client> {
        let (certificate, key) = (pki.path("admin.crt"), pki.path("admin.key"));
        Ok(Client(client(&pki.path("ca.crt"), Some([&certificate, &key]), None)?))
    }

    /// One exec of `true`, from the request to the word that it succeeded. The connection to the API server is there before.
    pub(super) fn exec(&self, port: u16) -> Result<Duration> {
        let mut stream = self.connect(port)?;
        let started = Instant::now();
        write!(
            stream,
            "GET /api/v1/namespaces/default/pods/web/exec?container=web&command=true&stdout=true HTTP/1.1\r\nHost: lab\r\n\
        Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
        Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
        )?;
        let said = read_until(&mut stream, br#""status":"Success""#)?;
        let took = started.elapsed();
        ensure!(said.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&said));
        Ok(took)
    }

    /// The last line of a log, from the request to its end.
    fn logs(&self, port: u16) -> Result<Duration> {
        let mut stream = self.connect(port)?;
        let started = Instant::now();
        write!(
            stream,
            "GET /api/v1/namespaces/default/pods/bystander/log?tailLines=1 HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"
        )?;
        let said = read_until(&mut stream, b"a line\n\r\n0\r\n\r\n")?;
        let took = started.elapsed();
        ensure!(said.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&said));
        Ok(took)
    }

    fn connect(&self, port: u16) -> Result<StreamOwned<ClientConnection, Box<dyn Stream>>> {
        let tcp = TcpStream::connect(socket(at().control, port)?)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(Duration::from_secs(30)))?;
        let session = ClientConnection::new(Arc::clone(&self.0), ServerName::try_from("kubernetes")?)?;
        let mut stream = StreamOwned::new(session, Box::new(tcp) as Box<dyn Stream>);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(stream)
    }
}

/// Reads until these bytes came.
fn read_until(stream: &mut impl Read, end: &[u8]) -> Result<Vec<u8>> {
    let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
    while !said.windows(end.len()).any(|window| window == end) {
        let count = stream.read(&mut buffer).with_context(|| String::from_utf8_lossy(&said).into_owned())?;
        ensure!(count > 0, "it ended early: {}", String::from_utf8_lossy(&said));
        said.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
    Ok(said)
}
