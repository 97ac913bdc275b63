//! Owns asking API servers for execs and logs, as kubectl does, but without starting kubectl: that takes longer than what is measured.
//! Called by `bench`.
//! Must never count a request that was not answered in full.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{
    bench::{Goal, Row, median, progress},
    certs::roots,
    client::Stream,
};
use rustls::{
    ClientConfig, ClientConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

use super::Amount;
use crate::{
    addresses::{at, socket},
    pki::Pki,
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
        let mut took = [(); 3].map(|()| Vec::new());
        for round in 0..amount.requests {
            for turn in 0..3 {
                let way = (round + turn) % 3;
                let milliseconds = ask(client, ports[way]).with_context(|| format!("{what} at {}", ports[way]))?;
                took[way].push(milliseconds.as_secs_f64() * 1000.0);
            }
        }
        let [ours, others @ ..] = took;
        for (who, other) in WHO.into_iter().zip(&others) {
            let goal = if who == WHO[0] { goal } else { None };
            rows.push(beside(&format!("{what} p50, guard | {who}"), median(&ours), median(other), goal));
            rows.push(beside(&format!("{what} p99, guard | {who}"), high(&ours), high(other), None));
        }
    }
    Ok(rows)
}

fn beside(what: &str, ours: f64, other: f64, goal: Goal) -> Row {
    Row::beside(what, "ms", ours, other, goal)
}

/// The value that one in a hundred is above.
fn high(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * 99 / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// The administrator, who asks API servers. It has to be in the control plane's network namespace.
pub(super) struct Client(Arc<ClientConfig>);

impl Client {
    /// Whom the cluster's certificates make it.
    pub(super) fn new(pki: &Pki) -> Result<Client> {
        let (certificate, key) = (
            CertificateDer::from_pem_file(pki.path("admin.crt"))?,
            PrivateKeyDer::from_pem_file(pki.path("admin.key"))?,
        );
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(&pki.path("ca.crt"))?)
            .with_client_auth_cert(vec![certificate], key)?;
        Ok(Client(Arc::new(config)))
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
