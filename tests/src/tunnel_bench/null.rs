//! Owns an agent that has no endpoints: what it gets of the real server, no agent can get more of.
//! Called by `main`, as a process of its own; it is the endpoint itself and drops what comes for it.
//! Must never do anything that an agent could leave out.

use std::{collections::HashMap, net::SocketAddr, path::Path};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use lab::{
    bare::{Place, SERVER},
    certs::client,
    process::Process,
};
use nodeguard::{
    tunnel::stream::{
        batch::{Batched, GATHERED},
        establish::{READ_AHEAD, ask},
    },
    wire::frames::{Frame, MAX_DATA, Packet, closed, data, dialled},
};
use rustls::pki_types::ServerName;
use tokio::{io::BufReader, net::TcpStream, sync::mpsc};
use tokio_rustls::TlsConnector;
use tonic::{metadata::MetadataMap, transport::Endpoint};

/// The address that the server takes for its node.
pub(crate) const ADDRESS: &str = "10.0.0.4";

/// Starts it for the real server.
pub(crate) fn start(place: &Place) -> Result<Process> {
    let certs = place.directory.display().to_string();
    let agent = crate::again(&["null", &format!("{SERVER}:8091"), &certs])?;
    Process::start("null agent", agent, &place.directory.join("null.log"))
}

/// What the process does.
pub(crate) async fn serve(server: SocketAddr, certs: &Path) -> Result<()> {
    let tcp = TcpStream::connect(server).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::from(server.ip());
    let shown = [&*certs.join("agent.crt"), &certs.join("agent.key")];
    let config = client(&certs.join("ca.crt"), Some(shown), Some("h2"))?;
    let mut tls = TlsConnector::from(config).connect(name, BufReader::with_capacity(READ_AHEAD, tcp)).await?;
    tls.get_mut().1.set_buffer_limit(Some(GATHERED));
    let mut metadata = MetadataMap::new();
    metadata.insert("agentid", "null".parse()?);
    metadata.insert("agentidentifiers", format!("ipv4={ADDRESS}").parse()?);
    let endpoint = Endpoint::from_shared(format!("http://{server}"))?;
    let (outbound, answer) = ask(Batched::new(tls), endpoint, metadata).await?;
    let (mut inbound, mut open, mut last) = (answer.into_inner(), HashMap::new(), 0);
    while let Some(packet) = inbound.message().await? {
        match Frame::from(packet) {
            Frame::Dial(dial) => {
                last += 1;
                open.insert(last, 0);
                outbound.send(dialled(dial.random, last)).await?;
            }
            Frame::Data(bytes) => {
                if let Some(left) = open.get_mut(&bytes.connect_id) {
                    take(left, bytes.connect_id, &bytes.data, &outbound).await?;
                }
            }
            Frame::Close(close) => {
                open.remove(&close.connect_id);
                outbound.send(closed(close.connect_id, String::new())).await?;
            }
            Frame::CloseDial(_) | Frame::Other(_) => {}
        }
    }
    bail!("the server ended the stream")
}

/// Takes what comes on a connection: a line that asks, or bytes of which so many are still to come. Nobody asks before the last answer.
async fn take(left: &mut usize, id: i64, mut bytes: &[u8], outbound: &mpsc::Sender<Packet>) -> Result<()> {
    if *left == 0 {
        let end = bytes.iter().position(|byte| *byte == b'\n').context("half a request")?;
        let (line, rest) = bytes.split_at(end + 1);
        bytes = rest;
        let line = std::str::from_utf8(line)?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["SINK", count] => *left = count.parse()?,
            ["SOURCE", count] => return source(id, count.parse()?, outbound).await,
            _ => bail!("asked for {line:?}"),
        }
    }
    *left = left.checked_sub(bytes.len()).context("more than was asked for")?;
    if *left == 0 {
        outbound.send(data(id, Bytes::from_static(b"k"))).await?;
    }
    Ok(())
}

async fn source(id: i64, count: usize, outbound: &mpsc::Sender<Packet>) -> Result<()> {
    static BYTES: [u8; MAX_DATA] = [0; MAX_DATA];
    let mut left = count;
    while left > 0 {
        let most = left.min(MAX_DATA);
        outbound.send(data(id, Bytes::from_static(BYTES.get(..most).unwrap_or_default()))).await?;
        left -= most;
    }
    Ok(())
}
